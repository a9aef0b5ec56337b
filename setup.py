"""What pyproject.toml cannot say: the README as a package index shows it, which has no files beside
it. Pictures are left out, links to files of the repository keep their words alone."""

import re
from pathlib import Path

from setuptools import setup

readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
readme = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", readme)
readme = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", readme)

setup(long_description=readme, long_description_content_type="text/markdown")
