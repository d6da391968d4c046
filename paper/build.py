"""Sets paper/quire.typ; called by scripts/paper, from the repository's root."""

import pathlib
import sys

import typst

# Fonts are those that Typst brings along and the figures' own, so that pages are the same on every machine.
compiler = typst.Compiler(root=".", font_paths=["experiments/assets"], ignore_system_fonts=True)


def build(**options):
    try:
        _, warnings = compiler.compile_with_warnings(input="paper/quire.typ", **options)
    except typst.TypstError as error:
        sys.exit(f"paper: {error.diagnostic or error}")
    # A figure that does not fit or a font that is missing is no error to Typst.
    for warning in warnings:
        print(f"paper: {warning}", file=sys.stderr)
    return len(warnings)


warnings = build(output="paper/quire.pdf")
print("paper/quire.pdf")
if "--pages" in sys.argv[1:]:
    pages = pathlib.Path("target/paper")
    pages.mkdir(parents=True, exist_ok=True)
    for old in pages.glob("*.png"):
        old.unlink()
    build(output=f"{pages}/{{p}}.png", format="png", ppi=150)
    print(f"{pages}/1.png and so on")
sys.exit(1 if warnings else 0)
