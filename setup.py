from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="llama-cpu",
    version="1.1.0",
    description="Inference of Meta's LLaMA models on a CPU, in plain PyTorch",
    license="GPL-3.0-only",
    packages=find_packages(include=["llama", "llama.*"]),
    python_requires=">=3.10",
    install_requires=Path(__file__).with_name("requirements.txt").read_text().split(),
)
