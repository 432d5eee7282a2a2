"""The public address stands in pyproject.toml; this rewrites every badge and link from it.

    python tests/links.py            # rewrite
    python tests/links.py --check    # only say what is out of step

A link is ours when it is a Colab badge, the address to clone, the CI badge, or a page on this repository's main branch.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATTERNS = (
    r"(?<=colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+(?=/blob/main/)",
    r"(?<=github\.com/)[\w.-]+/[\w-]+(?=\.git\b)",
    r"(?<=github\.com/)[\w.-]+/[\w.-]+(?=/(?:actions/workflows|blob/main|tree/main)/)",
)


def address() -> str:
    """owner/name, read from [project.urls]."""
    return re.search(r'^Repository = "https://github\.com/([\w.-]+/[\w.-]+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def files() -> list[Path]:
    """Where links may stand."""
    return [*ROOT.glob("*.md"), *ROOT.glob("data/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("notebooks/**/*.ipynb")]


def rewritten(text: str) -> str:
    """The text with every link of ours at the address."""
    for pattern in PATTERNS:
        text = re.sub(pattern, address(), text)
    return text


if __name__ == "__main__":
    stale = [path for path in files() if rewritten(path.read_text("utf-8")) != path.read_text("utf-8")]
    for path in stale:
        print(path.relative_to(ROOT))
        if "--check" not in sys.argv:
            path.write_text(rewritten(path.read_text("utf-8")), "utf-8", newline="\n")
    sys.exit(bool(stale) and "--check" in sys.argv)
