import pytest

from phi_lit.data.presets import PRESETS
from phi_lit.data.sources import open_source
from phi_lit.errors import UserError

USABLE = [name for name, preset in PRESETS.items() if not preset.refused]


@pytest.mark.parametrize("name", USABLE)
def test_every_preset_is_a_source_that_says_its_licence(name):
    source = open_source(name)
    preset = PRESETS[name]
    assert source.hub == preset.hub
    assert source.label == name
    assert source.licence_line().startswith(f"{name} ({preset.hub}): licence {preset.licence}")
    assert source.rows.needed()
    assert source.describe() == {
        key: value for key, value in source.describe().items() if key != "licence"
    }


def test_the_replicas_and_general_texts_of_the_recipe_are_there():
    hubs = {PRESETS[name].hub for name in USABLE}
    assert hubs >= {
        "jinaai/code_exercises",
        "nampdn-ai/tiny-codes",
        "open-phi/textbooks",
        "open-phi/programming_books_llama",
        "SciPhi/textbooks-are-all-you-need-lite",
        "vikp/textbook_quality_programming",
        "HuggingFaceTB/cosmopedia",
        "bigcode/the-stack-dedup",
        "codeparrot/github-code-clean",
        "tiiuae/falcon-refinedweb",
        "allenai/c4",
        "EleutherAI/the_pile_deduplicated",
    }


@pytest.mark.parametrize(
    "spec",
    [
        "python-edu",
        "stack-edu",
        {"hub": "HuggingFaceTB/smollm-corpus", "config": "python-edu"},
        {"hub": "HuggingFaceTB/stack-edu", "config": "Python"},
        "huggingfacetb/STACK-EDU",
    ],
)
def test_data_sets_of_identifiers_are_refused_by_name(spec):
    with pytest.raises(UserError, match="holds no text, only identifiers"):
        open_source(spec)


def test_other_parts_of_a_partly_refused_data_set_are_allowed():
    spec = {"hub": "HuggingFaceTB/smollm-corpus", "config": "cosmopedia-v2"}
    assert open_source(spec).config == "cosmopedia-v2"


def test_a_preset_can_be_refined():
    source = open_source({"preset": "tiny-codes", "where": {"target_audience": "beginner"}})
    assert source.where == {"programming_language": "Python", "target_audience": "beginner"}
    assert open_source({"preset": "cosmopedia", "config": "openstax"}).config == "openstax"
    assert open_source({"preset": "textbooks", "columns": "outline"}).columns == "outline"


def test_an_unknown_preset_names_the_near_ones():
    with pytest.raises(UserError, match="Did you mean 'textbooks'"):
        open_source({"preset": "textbook"})
