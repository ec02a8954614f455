"""`vllm-llmd index verify`: has a router compare its index with what every engine says it holds, block by block."""

import argparse
import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp

from vllm_llmd.errors import LlmdError
from vllm_llmd.router.settings import API_KEY_VARIABLE

TIMEOUT_S = 30.0


class VerifyError(LlmdError):
    """The router could not be asked, or its index differs from what engines hold. `code` is the router's, if any."""

    def __init__(self, text: str, code: str | None = None) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Finding:
    """Of one engine: `trouble` if it could not be verified, else its blocks and how far the index is off.

    `unverifiable` if there is no way to, which is nobody's fault.
    """

    engine: str
    trouble: str | None = None
    unverifiable: bool = False
    blocks: int = 0
    missing: int = 0
    extra: int = 0

    @property
    def exact(self) -> bool:
        return self.trouble is None and not self.missing and not self.extra

    def line(self) -> str:
        if self.trouble is not None:
            return f"{self.engine}: not verified: {self.trouble}"
        said = "exact" if self.exact else f"{self.missing} missing, {self.extra} extra"
        return f"{self.engine}: {self.blocks} blocks, {said}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--router", default="http://127.0.0.1:8000", help="the router's address (default: %(default)s)")
    parser.add_argument("--engine", action="append", help="only this one; may be repeated (default: all)")
    parser.add_argument("--api-key", help=f"what the router wants as bearer token; also read from {API_KEY_VARIABLE}")


def run(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """One line per engine. Raises VerifyError unless the index is exact for all."""
    key = args.api_key or os.environ.get(API_KEY_VARIABLE)
    findings = asyncio.run(_verify(args.router.rstrip("/"), key, args.engine))
    for finding in findings:
        say(finding.line())
    if not findings:
        raise VerifyError(f"the router at {args.router} knows no engine")
    wrong = [finding.engine for finding in findings if not finding.exact and not finding.unverifiable]
    if wrong:
        raise VerifyError(f"the index is not exact for {', '.join(wrong)}")
    return 0


async def _verify(router: str, key: str | None, wanted: list[str] | None) -> list[Finding]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        try:
            listed = await _json(session, "GET", f"{router}/admin/engines")
            engines = wanted or [engine["id"] for engine in listed["engines"]]
            return list(await asyncio.gather(*(_finding(session, router, engine) for engine in engines)))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise VerifyError(f"the router at {router} cannot be asked: {error or 'it does not answer'}") from None


async def _finding(session: aiohttp.ClientSession, router: str, engine: str) -> Finding:
    try:
        found = await _json(session, "POST", f"{router}/admin/index/{engine}/verify")
    except VerifyError as error:
        return Finding(engine, trouble=str(error), unverifiable=error.code == "cannot_be_verified")
    return Finding(engine, None, False, found["blocks"], found["missing"], found["extra"])


async def _json(session: aiohttp.ClientSession, method: str, url: str) -> Any:
    async with session.request(method, url) as response:
        answer = await response.json()
        if response.status != HTTPStatus.OK:
            raise VerifyError(answer["error"]["message"], answer["error"].get("code"))
        return answer
