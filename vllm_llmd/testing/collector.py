"""An OpenTelemetry collector in this process: keeps every span that is exported to it."""

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


class Collector:
    """Takes OTLP over HTTP with protobuf at `endpoint`. Needs opentelemetry-proto, which vLLM brings."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        """Everything exported so far, as protobuf spans."""
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                spans.extend(_spans(self.rfile.read(int(self.headers["Content-Length"])), self.headers))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    def __enter__(self) -> "Collector":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def of_trace(self, trace_id: str) -> list[Any]:
        """The spans of one trace, by its id in hexadecimal."""
        return [span for span in list(self.spans) if span.trace_id.hex() == trace_id]


def _spans(body: bytes, headers: Any) -> list[Any]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    raw = gzip.decompress(body) if headers["Content-Encoding"] == "gzip" else body
    request = ExportTraceServiceRequest.FromString(raw)
    return [span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans]
