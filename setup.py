"""Package metadata of jlora; tool settings live in pyproject.toml."""

from setuptools import find_packages, setup

CORE = [
    "absl-py>=2.1",
    "chex>=0.1.90",
    "flax>=0.12",
    "jax>=0.8",
    "jaxtyping>=0.3",
    "numpy>=2.0",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.28",
    "PyYAML>=6.0",
    "regex>=2024.5",
    "safetensors>=0.5",
    "scipy>=1.13",
    "tqdm>=4.66",
]
EXPERIMENTS = [
    "gguf>=0.17",
    "grain>=0.2.12",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "pillow>=11.0",
    "protobuf>=4.25",
    "resvg-py>=0.5",
    "scikit-learn>=1.5",
    "tensorboard>=2.17",
    "tensorboardX>=2.6",
    "threadpoolctl>=3.1",
    "tokenizers>=0.21",
    "transformers>=5.0",
]
SERVE = [
    "jinja2>=3.1",
    "starlette>=0.40",
    "tokenizers>=0.21",
    "transformers>=5.0",
    "uvicorn>=0.30",
]
DOCS = [
    "latex2mathml>=3.77",
    "mkdocs>=1.6",
    "mkdocs-material>=9.6",
    "mkdocstrings[python]>=0.29",
]
# JAX packages with models of their own: tests/golden/make_stacks.py runs them.
STACKS = [
    "gemma>=3.0",
    "google-tunix>=0.1",
    "keras-hub>=0.20",
]
# It pins other releases than those accept, and imports torch and pillow without requiring them.
EASYDEL = ["easydel>=0.3", "pillow", "torch==2.13.0"]
# It declares nothing that it imports, and needs Python 3.12.
MAXTEXT = [
    "aqtp",
    "drjax",
    "grain",
    "huggingface-hub",
    "jinja2",
    "maxtext>=0.2.5; python_version >= '3.12'",
    "ml-collections",
    "omegaconf",
    "pathwaysutils",
    "pillow",
    "pydantic",
    "qwix>=0.1.8",
    "sentencepiece",
    "sympy",
    "tiktoken",
    "tokamax",
    "transformers>=5.0",
]
# torch is pinned: the tests compare with it on the CPU, nothing else may import it.
TEST = [
    "datasets>=4.0",
    "diffusers==0.42.1; python_version < '3.12'",
    "equinox>=0.13",
    "flatbuffers>=24.3",
    # haliax 1.3 looks for names that JAX has given up; 1.4 has development releases only
    "haliax==1.4.dev453; python_version < '3.12'",
    "hypothesis>=6.100",
    "ipykernel>=6.29",
    "lycoris-lora==4.1.3; python_version < '3.12'",
    "nbclient>=0.10",
    "openai>=2.0",
    "peft==0.21.2",
    "pyright>=1.1.400",
    "pytest>=8.3",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.8",
    "qwix>=0.1.8",
    "ruff>=0.14",
    "torch==2.13.0; python_version < '3.12'",
    "xllamacpp>=2026.10",  # llama.cpp itself
]

setup(
    name="jlora",
    version="0.1.0",
    description="Low-rank adapters in JAX: parameterise, generate, merge and exchange them.",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["jlora", "jlora.*", "experiments", "experiments.*"]),
    package_data={
        "experiments.pretraining": ["base_l/*"],  # a trained decoder of 6 MB
        "experiments.clip": ["base_c/*"],  # a trained CLIP of 3 MB
        "experiments.pictures": ["base_d/*"],  # a trained diffusion transformer of 7 MB
        "experiments.generating": ["minilm/*"],  # a generator of 3 MB
    },
    entry_points={"console_scripts": ["jlora = jlora.cli.main:main"]},
    install_requires=CORE,
    extras_require={
        "experiments": EXPERIMENTS,
        "gguf": ["gguf>=0.17"],
        "glue": ["datasets>=4.0"],
        "serve": SERVE,
        "simulator": ["gymnasium[mujoco]==1.4.0", "mujoco==4.0.0"],
        "ray": [*SERVE, "ray[serve]>=2.40"],
        "docs": DOCS,
        "stacks": STACKS,
        "stacks-easydel": EASYDEL,
        "stacks-maxtext": MAXTEXT,
        "test": EXPERIMENTS + SERVE + DOCS + TEST,
    },
)
