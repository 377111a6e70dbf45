"""What the site changes in the pages: links into the repository, which has no address yet, and formulas.

Formulas become MathML, which browsers draw by themselves: no script from another server.
"""

import re

from latex2mathml.converter import convert

CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
FORMULA = re.compile(r"(\$\$.+?\$\$|\$[^$\n]+\$)", re.DOTALL)
OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]+\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return the text of a page as it is built."""
    markdown = OUTSIDE.sub(r"\1", markdown)
    parts = CODE.split(markdown)
    return "".join(part if part.startswith("`") else FORMULA.sub(_mathml, part) for part in parts)


def _mathml(formula: re.Match[str]) -> str:
    block = formula[0].startswith("$$")
    return convert(formula[0].strip("$").strip(), display="block" if block else "inline")
