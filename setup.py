"""Maps the top-level folders to packages; everything else is in pyproject.toml.

`kernels` and `router` must not be importable by their bare names: see docs/decisions/0002-package-mapping.md.
"""

from setuptools import setup

setup(
    packages=[
        "vllm_llmd",
        "vllm_llmd.sim",
        "vllm_llmd.simulate",
        "vllm_llmd.testing",
        "vllm_llmd.kv_connector",
        "vllm_llmd.router",
        "vllm_llmd.router.policies",
        "vllm_llmd.kernels",
    ],
    package_dir={
        "vllm_llmd": "vllm_llmd",
        "vllm_llmd.kv_connector": "kv_connector",
        "vllm_llmd.router": "router",
        "vllm_llmd.router.policies": "router/policies",
        "vllm_llmd.kernels": "kernels",
    },
    package_data={"vllm_llmd": ["py.typed"]},
)
