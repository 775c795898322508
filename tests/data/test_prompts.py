import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpmoe.data.harmony import RenderConfig, Renderer
from vpmoe.data.prompts import QueryPrompts, shuffled_index
from vpmoe.errors import DataError


def test_queries_become_prompts_of_the_effort_asked_for(tmp_path):
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"synth_id": ["a", "b"], "query": ["What?", "Why?"]}), file)
    render = RenderConfig()
    pool = QueryPrompts(str(file), render)
    prompt = pool.prompt(1, "high")
    assert (len(pool), prompt.sample_id) == (2, "b")
    assert prompt.tokens.tolist() == Renderer(render).prompt("Why?", "high").tolist()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"synth_id": ["a"]}, "query"),
        ({"synth_id": pa.array([], pa.string()), "query": pa.array([], pa.string())}, "no prompts"),
    ],
)
def test_a_file_without_questions_is_refused(tmp_path, columns, said):
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), file)
    with pytest.raises(DataError, match=said):
        QueryPrompts(str(file), RenderConfig())


def test_a_file_that_is_no_parquet_and_an_empty_question_are_refused(tmp_path):
    file = tmp_path / "rows.parquet"
    file.write_text("no")
    with pytest.raises(DataError, match="cannot read prompts"):
        QueryPrompts(str(file), RenderConfig())
    pq.write_table(pa.table({"synth_id": ["a"], "query": [""]}), file)
    with pytest.raises(DataError, match="prompt 'a' is ''"):
        QueryPrompts(str(file), RenderConfig()).prompt(0, None)


def test_the_stream_of_questions_asks_each_once_an_epoch():
    epochs = [[shuffled_index(e * 50 + i, 50, seed=3) for i in range(50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != np.arange(50).tolist()
