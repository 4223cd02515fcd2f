"""Count lines of code: without blank lines, comments and docstrings, which explain and cost nothing to run."""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """Count the lines on which a token of code stands; strings that are statements of their own are documentation."""
    told = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - told)


if __name__ == "__main__":
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "src/lmkit")
    rooms: Counter[str] = Counter()
    for file in root.rglob("*.py"):
        rooms[file.relative_to(root).parts[0]] += code_lines(file.read_text(encoding="utf-8"))
    for name, count in sorted(rooms.items(), key=lambda room: -room[1]):
        print(f"{count:6,}  {name}")  # noqa: T201
    print(f"{rooms.total():6,}  lines of code in {root}")  # noqa: T201
