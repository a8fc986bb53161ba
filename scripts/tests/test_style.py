"""Checks documents, comments and printed text against the house style of CONTRIBUTING.md."""
import io
import re
import sys
import tokenize
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Words of the project's old dialect, with what to write instead. CONTRIBUTING.md has the same list.
WORDS = {
    r"told|tells": "reported, shown",
    r"anew": "again, rebuilt",
    r"lone": "single",
    r"beside": "next to, besides, while",
    r"kept": "saved, cached, retained",
    r"ours|theirs": "this suite, the Python version",
    r"proofs?|prov(?:e|es|ed|en|ing)": "check, verify",
    r"oracle": "reference",
    r"recipes?": "variant",
    r"figures?(?! of merit)": "number, result",
    r"exchang(?:e|es|ed|ing)": "all-reduce, communicate",
    r"twins?": "Python counterpart",
    r"(?:in|by) turns": "interleaved, alternating",
    r"in the place of|in its place|in their place": "instead of",
    r"h(?:eld|old|olds) [^.]{0,40}\bagainst": "compared with",
    r"(?<!there )(?:is|are|was|were) no(?! longer\b| more\b| less\b| fewer\b| better\b| worse\b) \w+": "is not a …",
    r"so many": "N, the number of",
    r"as many as (?:it|they) (?:has|have)": "all",
    r"what (?:is|was|are|were) (?:lost|kept|made|given|there|measured|seen|said|found)": "name the thing",
    r"(?:is|was|are|were) given\b(?! (?:by|to|as)\b)|given models?": "custom, user-supplied",
    r"(?:stands?|lies?) (?:in|for|beside|above|below|behind|at)": "is",
    r"called (?:slower|faster|equivalent)": "reported as",
    r"None (?:where|of|unless)": "Returns None if",
    r"else why not": "or the reason",
}
PATTERN = re.compile("|".join(rf"(?P<w{i}>\b(?:{word})\b)" for i, word in enumerate(WORDS)), re.IGNORECASE)
# How the first line of a doc comment must not begin: it is a verb in the third person or a noun phrase.
OPENINGS = re.compile(r"^(?:What|Where|Whether|Of|The same|How|Why|None)\b(?!\?)")
MOST_WORDS = 25

DOCUMENTS = ["*.md", ".github/**/*.md", "benches/**/*.md", "src/**/*.md", "criterion-baselines/*.md"]
RUST = ["build.rs", "src/**/*.rs", "benches/**/*.rs"]
PYTHON = ["scripts/*", "scripts/**/*.py", "src/**/*.py"]
NATIVE = ["src/**/*.cpp", "src/**/*.hpp", "src/**/*.h", "src/**/*.c"]
PAGES = ["src/**/*.html"]
# Tables of old words, and quotations from other projects.
EXEMPT = {"scripts/tests/test_style.py", "src/mlx/native/bindings.rs", "src/results/upgrade.rs"}


def files(patterns):
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and str(path.relative_to(ROOT)) not in EXEMPT:
                yield path


def old_words(text):
    """Returns each old word of `text` with its replacement."""
    for match in PATTERN.finditer(text):
        yield match.group(0), list(WORDS.values())[int(match.lastgroup[1:])]


def prose(markdown):
    """Yields the line number and the text of each paragraph or list item, without code, tables and headings."""
    block, start, fenced = [], 0, False
    for number, line in enumerate(markdown.splitlines() + [""], 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            line = ""
        table = line.lstrip().startswith(("|", "#", "<", "!["))
        item = re.match(r"\s*(?:[-*]|\d+\.)\s", line)
        if fenced or table or not line.strip() or item:
            if block:
                yield start, " ".join(block)
            block = []
        if not (fenced or table) and line.strip():
            if not block:
                start = number
            block.append(line.strip())


def sentences(text):
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"\b(e\.g|i\.e|vs|etc|Fig|no)\.", r"\1", text)
    return [s for s in re.split(r"(?<=[.!?:;])[)\"*_]*\s+", text) if s.strip()]


def rust_texts(source):
    """Yields the line number, the kind and the text of each comment and string of a Rust file."""
    for number, line in enumerate(source.splitlines(), 1):
        comment = re.match(r"\s*(///|//!|//)\s?(.*)", line)
        if comment:
            yield number, comment.group(1), comment.group(2)
            continue
        code, _, trailing = line.partition(" // ")
        if trailing:
            yield number, "//", trailing
        for string in re.findall(r'"((?:[^"\\]|\\.)*)"', code):
            # Identifiers, paths and keys are no prose.
            if " " in string.strip():
                yield number, '"', string


def python_texts(source):
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")
        elif token.type == tokenize.STRING and " " in token.string.strip():
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def shell_texts(source):
    for number, line in enumerate(source.splitlines(), 1):
        if not line.startswith("#!") and (" " in line.strip()) and re.search(r'#|"|echo|^ {2,}--|^[A-Z]', line):
            yield number, line


def findings(only=()):
    """Yields `path:line: problem` for everything that breaks the house style."""
    wanted = [str(Path(path).resolve()) for path in only]

    def chosen(patterns):
        return (p for p in files(patterns) if not wanted or any(str(p).startswith(w) for w in wanted))

    for path in chosen(DOCUMENTS):
        name, text = path.relative_to(ROOT), path.read_text()
        for number, line in enumerate(text.splitlines(), 1):
            for word, instead in old_words(re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)):
                yield f"{name}:{number}: '{word}': write {instead}"
        for number, block in prose(text):
            for sentence in sentences(block):
                if len(sentence.split()) > MOST_WORDS:
                    yield f"{name}:{number}: {len(sentence.split())} words (at most {MOST_WORDS}): {sentence[:70]}…"
    for path in chosen(RUST):
        name = path.relative_to(ROOT)
        before = None
        for number, kind, text in rust_texts(path.read_text()):
            for word, instead in old_words(re.sub(r"`[^`]*`", "", text)):
                yield f"{name}:{number}: '{word}': write {instead}"
            first = kind in ("///", "//!") and before not in ((number - 1, "///"), (number - 1, "//!"))
            after_errors = kind == "///" and before == (number - 1, "# Errors")
            if (first or after_errors) and OPENINGS.match(text):
                yield f"{name}:{number}: a doc comment begins with '{text.split()[0]}'"
            before = (number, "# Errors" if text.strip() == "# Errors" else kind)
    for path in chosen(PYTHON):
        name, source = path.relative_to(ROOT), path.read_text(errors="replace")
        python = path.suffix == ".py" or source.startswith("#!/usr/bin/env python3")
        for number, text in (python_texts if python else shell_texts)(source):
            for word, instead in old_words(re.sub(r"`[^`]*`", "", text)):
                yield f"{name}:{number}: '{word}': write {instead}"
    for path in chosen(NATIVE + PAGES):
        name = path.relative_to(ROOT)
        for number, line in enumerate(path.read_text().splitlines(), 1):
            comment = line if path.suffix == ".html" else line.partition("//")[2]
            for word, instead in old_words(comment):
                yield f"{name}:{number}: '{word}': write {instead}"


class Style(unittest.TestCase):
    def test_house_style(self):
        found = list(findings())
        self.assertFalse(found, "\n" + "\n".join(found))

    def test_the_checker_finds_what_it_should(self):
        for text in ["it is told to the user", "the figure is no number", "rounds in turns", "None where it fails"]:
            self.assertTrue(list(old_words(text)), text)
        for text in ["it is no longer used", "the number of steps", "a model given by its path"]:
            self.assertFalse(list(old_words(text)), text)
        long = " ".join(["word"] * (MOST_WORDS + 1)) + "."
        self.assertGreater(len(sentences(long)[0].split()), MOST_WORDS)
        self.assertTrue(OPENINGS.match("Whether it runs."))
        self.assertFalse(OPENINGS.match("Returns true if it runs."))


if __name__ == "__main__":
    # With paths: lists what is found in them.
    if len(sys.argv) > 1:
        print("\n".join(findings(sys.argv[1:])))
    else:
        unittest.main()
