"""The table of docs/models.md: its rows are known model types, and its cells are what a run gives."""

from __future__ import annotations

import pytest

from tests.publish_models import BEGIN, END, PAGE, model_types, published, ran, table

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]


def test_the_page_has_the_known_model_types():
    rows = published()
    assert rows
    assert tuple(rows) == tuple(kind for kind in model_types() if kind in rows)
    assert PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0] == table(rows)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gemma2"])
def test_a_row_is_what_a_run_gives(kind):
    assert dict(ran((kind,))) == {kind: published()[kind]}
