"""Files of packages to text, and what is no text worth reading."""

import gzip
import random
import shutil

import pytest

from benchmarks.corpus.extraction import (
    LONGEST,
    is_worth_reading,
    pieces_of,
    suffix_of,
    text_of,
)


def test_suffixes_without_compression():
    assert suffix_of("usr/share/man/man3/printf.3.gz") == ".3"
    assert suffix_of("usr/share/dictd/foldoc.dict.dz") == ".dict"
    assert suffix_of("a/B.HTML") == ".html"
    assert suffix_of("a/README") == ""


def test_plain_text_is_cleaned():
    text = "\ufeffone  \r\n\r\n\r\n\r\ntwo\x07\x0cthree\n\n"
    assert text_of("a.txt.gz", gzip.compress(text.encode())) == "one\n\ntwo\nthree\n"
    assert text_of("a.c", "größer".encode("latin-1")) == "größer\n"
    assert text_of("a.txt", b" \n\n") == ""
    with pytest.raises(ValueError, match="a zero byte"):
        text_of("a.py", b"x\0")
    with pytest.raises(ValueError, match="not gzip"):
        text_of("a.py.gz", b"x = 1")


def test_html_without_what_is_on_every_page():
    pytest.importorskip("inscriptis")
    page = """<html><head><meta charset="utf-8"><style>p {}</style></head><body>
        <nav>Home Up</nav><div class="navheader">Prev Next</div>
        <h1>Title<a class="headerlink" href="#t">¶</a></h1>
        <p>First &amp; second.</p><pre>if x:\n    y()</pre>
        <script>z()</script><div class="sphinxsidebar">Search</div></body></html>"""
    text = text_of("a.html", page.encode())
    assert [line.strip() for line in text.split("\n") if line.strip()] == [
        "Title",
        "First & second.",
        "if x:",
        "y()",
    ]
    assert "    y()" in text
    latin = '<html><head><meta charset="iso-8859-1"></head><body>größer</body></html>'
    assert text_of("a.html", latin.encode("latin-1")) == "größer\n"


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
def test_man_pages():
    page = b".TH AB 1\n.SH NAME\nab \\- does \\fBall\\fR of it\n"
    text = text_of("usr/share/man/man1/ab.1.gz", gzip.compress(page))
    assert "NAME\n" in text
    assert "does all of it" in text
    with pytest.raises(ValueError, match="no man page"):
        text_of("usr/share/man/man1/b.1", b".so man1/ab.1\n")


def test_info_without_its_tables():
    text = (
        "\x1f\nFile: a.info,  Node: Top,  Up: (dir)\n\nHello.\n\x1f\nTag Table:\nNode: Top\x7f1\n"
    )
    assert text_of("a.info", text.encode()) == "Hello.\n"


def test_long_texts_are_cut_between_paragraphs():
    paragraph = "word " * 2000 + "\n\n"
    text = paragraph * (2 * LONGEST // len(paragraph))
    pieces = list(pieces_of(text))
    assert len(pieces) == 3
    assert all(len(piece) <= LONGEST and piece.startswith("word") for piece in pieces)
    assert "".join(pieces).split() == text.split()


def test_what_is_worth_reading():
    prose = " ".join(f"Sentence {i} says {i * i} of it." for i in range(300))
    lines = prose.replace(". ", ".\n")
    assert is_worth_reading(lines)
    assert not is_worth_reading("short")
    assert not is_worth_reading(prose)  # one long line
    assert not is_worth_reading("#define REGISTER_0001 0x0001\n" * 1000)
    letters = random.Random(0).choices(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz+/", k=9000
    )
    data = "".join(letters)
    assert not is_worth_reading("\n".join(data[i : i + 76] for i in range(0, 9000, 76)))
