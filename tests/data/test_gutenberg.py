"""Project Gutenberg's header and licence are cut off, and nothing of the book is."""

import pytest

from phi_lit.data.gutenberg import strip_boilerplate
from phi_lit.data.sources import open_source
from phi_lit.errors import UserError

BOOK = "EMMA\n\nBy Jane Austen\n\nCHAPTER I\n\n* * *\n\nEmma Woodhouse, handsome, clever, and rich,"
HEADER = "The Project Gutenberg EBook of Emma, by Jane Austen\r\n\nThis eBook is for the use of\n\n"
LICENCE = "\n\nUpdated editions will replace the previous one.\n"
MARKED = {
    "today": ("*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***", "*** END OF THE PROJECT"),
    "2004": ("***START OF THE PROJECT GUTENBERG EBOOK EMMA***", "***END OF THE PROJECT GUTENBERG"),
    "2006": ("*** START OF THIS PROJECT GUTENBERG EBOOK EMMA ***", "End of the Project Gutenberg"),
    "two lines": ("*** START OF THE PROJECT GUTENBERG EBOOK EMMA, OR\nHIGHBURY ***", "*** END OF"),
    "1994": ("*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
             "End of Project Gutenberg's Emma, by Jane Austen"),
    "1998": ("*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
             "End of this Project Gutenberg Etext of Emma"),
}  # fmt: skip


@pytest.mark.parametrize("year", MARKED)
def test_the_book_alone_is_kept_whatever_the_wording_of_its_time(year):
    start, end = MARKED[year]
    text = f"{HEADER}{start}\n\n\n{BOOK}\n\n\n{end} EMMA ***{LICENCE}"
    assert strip_boilerplate(text) == BOOK + "\n"
    assert strip_boilerplate(text.replace("\n", "\r\n")) == BOOK.replace("\n", "\r\n") + "\n"


def test_a_file_with_both_kinds_of_header_loses_both():
    small_print, marker = MARKED["1994"][0], MARKED["today"][0]
    assert strip_boilerplate(f"{HEADER}{small_print}\n{marker}\n{BOOK}") == BOOK + "\n"


def test_one_marker_cuts_one_side_and_no_marker_nothing():
    start, end = MARKED["today"]
    assert strip_boilerplate(f"{HEADER}{start}\n{BOOK}") == BOOK + "\n"
    assert strip_boilerplate(f"{BOOK}\n{end}{LICENCE}") == BOOK + "\n"
    untouched = f"  {BOOK}\nHe wrote '*** START OF a line' and 'End of the Project'.\n\n"
    assert strip_boilerplate(untouched) == untouched


def test_a_directory_of_books_is_a_source(tmp_path):
    start, end = MARKED["today"]
    (tmp_path / "158-0.txt").write_text(f"{HEADER}{start}\n{BOOK}\n{end}{LICENCE}")
    (tmp_path / "empty.txt").write_text(f"{HEADER}{start}\n\n{end}{LICENCE}")
    spec = {"path": str(tmp_path), "strip": "gutenberg"}
    source = open_source(spec)
    assert [document.text for document in source.documents()] == [BOOK + "\n"]
    assert source.skipped.counts == {"empty": 1}
    plain = open_source(str(tmp_path))
    assert next(plain.documents()).text.startswith(HEADER.replace("\r\n", "\n")[:20])
    assert source.describe() != plain.describe()  # other tokens: the store would be stale


def test_the_preset_strips_and_names_what_it_reads(tmp_path):
    source = open_source("gutenberg")
    assert (source.hub, source.rows.needed()) == ("sedthh/gutenberg_english", ["TEXT"])
    assert source.strip == "gutenberg"
    assert "public domain in the USA" in source.licence_line()


def test_the_preset_reads_a_directory_laid_out_like_its_hub(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "data").mkdir()
    start, end = MARKED["today"]
    columns = {"TEXT": [f"{HEADER}{start}\n{BOOK}\n{end}"], "SOURCE": ["g"], "METADATA": ["{}"]}
    pyarrow.parquet.write_table(
        pyarrow.table(columns), tmp_path / "data" / "train-00000-of-00001.parquet"
    )
    source = open_source({"preset": "gutenberg", "hub": str(tmp_path)})
    source.check()
    assert [document.text for document in source.documents()] == [BOOK + "\n"]


def test_another_boilerplate_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="strip is 'html'; it can be gutenberg"):
        open_source({"path": str(tmp_path), "strip": "html"})
