"""Maps the top-level folders to packages; everything else is in pyproject.toml.

`kernels` and `router` must not be importable by their bare names: see docs/decisions/0002-package-mapping.md.
"""

from setuptools import setup

OF_ROUTER = (
    "audit",
    "autoscaling",
    "index",
    "learning",
    "members",
    "placement",
    "policies",
    "serving",
    "stock",
    "upstream",
    "waiting",
)

setup(
    packages=[
        "vllm_llmd",
        "vllm_llmd.sim",
        "vllm_llmd.simulate",
        "vllm_llmd.testing",
        "vllm_llmd.kv_connector",
        "vllm_llmd.router",
        *(f"vllm_llmd.router.{folder}" for folder in OF_ROUTER),
        "vllm_llmd.kernels",
    ],
    package_dir={
        "vllm_llmd": "vllm_llmd",
        "vllm_llmd.kv_connector": "kv_connector",
        "vllm_llmd.router": "router",
        **{f"vllm_llmd.router.{folder}": f"router/{folder}" for folder in OF_ROUTER},
        "vllm_llmd.kernels": "kernels",
    },
    package_data={"vllm_llmd": ["py.typed"]},
)
