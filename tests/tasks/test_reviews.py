"""Chinese reviews: how they are read and cut, what the vocabulary learns, and that padding has no influence."""

import logging

import pytest
import torch

from tasks import reviews
from tasks.bundled import made_reviews
from tasks.errors import BadRow, UserError
from tasks.fields import check_row
from tasks.networks.text import BiLSTM
from tasks.reviews import Labelled, Reviews

PLAIN = 'label,review\n1,"房间干净，服务热情"\n0,早餐单调\n'


def rows_of(task):
    return [task.row(example.reference) for example in task.examples(task.source)]


def saved(tmp_path, content, name="reviews.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("content", "name", "settings"),
    [
        (PLAIN, "a.csv", {}),
        (PLAIN.encode("utf-8-sig"), "a.csv", {}),
        (PLAIN.encode("gb18030"), "a.csv", {"encoding": "gb18030"}),
        ('label\ttext_a\n1\t"房间干净,服务热情\n0\t早餐单调\n', "a.tsv", {"column": "text_a", "quotes": False}),
    ],
    ids=["utf-8", "with a mark", "gb18030", "tsv"],
)
def test_reviews_are_read_and_cut_into_words(tmp_path, content, name, settings):
    rows = rows_of(Reviews(source=Labelled(path=saved(tmp_path, content, name), **settings)))
    assert rows == [
        {"words": ["房间", "干净", "服务", "热情"], "label": 1},
        {"words": ["早餐", "单调"], "label": 0},
    ]


def test_a_file_of_another_encoding_is_refused_with_its_line(tmp_path):
    task = Reviews(source=Labelled(path=saved(tmp_path, PLAIN.encode("gb18030"))))
    with pytest.raises(UserError, match="line 2: is not utf-8") as caught:
        rows_of(task)
    assert "task.source.encoding=gb18030" in caught.value.hint


def test_a_file_without_the_columns_is_refused(tmp_path):
    with pytest.raises(UserError, match="no column 'label'"):
        rows_of(Reviews(source=Labelled(path=saved(tmp_path, "star,review\n1,好\n"))))


@pytest.mark.parametrize(
    ("label", "review", "reason"),
    [
        ("", "好", "line 7: the label is missing"),
        ("2", "好", "line 7: unknown label '2', expected 0 or 1"),
        ("good", "好", "unknown label"),
        ("1", "  ", "the text is empty"),
    ],
)
def test_a_broken_review_is_a_bad_row(label, review, reason):
    with pytest.raises(BadRow, match=reason):
        Reviews().row((7, label, review))


def words(review, **settings):
    return Reviews(source=Labelled(**settings)).row((1, "1", review))["words"]


def test_words_have_one_spelling_of_width_and_case():
    assert words("ＧＯＯＤ！好") == words("Good!好") == ["good", "!", "好"]


def test_stop_words_are_left_out_and_negations_are_kept(tmp_path):
    assert words("这个房间的服务不好") == ["房间", "服务", "不好"]
    none = saved(tmp_path, "", "none.txt")
    assert words("这个房间的服务不好", stop_words=none) == ["这个", "房间", "的", "服务", "不好"]
    own = saved(tmp_path, "房间\n服务\n", "own.txt")
    assert words("这个房间的服务不好", stop_words=own) == ["这个", "的", "不好"]
    with pytest.raises(UserError, match="no such file"):
        words("好", stop_words=str(tmp_path / "absent.txt"))


def test_long_reviews_are_cut_off():
    assert words("好看的书" * 100, max_words=5) == ["好看", "书", "好看", "书", "好看"]


ROWS = [
    {"words": ["a", "b", "b"], "label": 1},
    {"words": ["b", "c"], "label": 0},
    {"words": ["c", "d", "b", "a"], "label": 1},
]


def test_the_vocabulary_counts_from_two_by_frequency():
    facts = Reviews().facts(iter(ROWS))
    assert facts["tokens"] == {"vocabulary": {"b": 2, "a": 3, "c": 4}, "longest": 4}
    assert facts["label"] == {"classes": ["negative", "positive"], "counts": [1, 2]}
    few = Reviews(source=Labelled(min_count=1, vocabulary=2)).facts(ROWS)
    assert few["tokens"]["vocabulary"] == {"b": 2, "a": 3}


def test_unknown_words_share_a_number_and_no_text_is_empty():
    task, facts = Reviews(), Reviews().facts(ROWS)
    assert task.encode({"words": ["b", "z", "a"], "label": 1}, facts) == {"tokens": [2, 1, 3], "label": 1}
    assert task.encode({"words": []}, facts) == {"tokens": [1]}


def test_rows_pass_the_declared_fields():
    task, facts = Reviews(), Reviews().facts(ROWS)
    checked = check_row(task.encode(ROWS[0], facts), task.fields, facts)
    assert checked["tokens"].tolist() == [3, 2, 2] and checked["label"] == 1


def test_made_reviews_depend_on_the_seed_alone():
    first = list(made_reviews.reviews(200, 0))
    assert first == list(made_reviews.reviews(200, 0)) != list(made_reviews.reviews(200, 1))
    assert first[:50] == list(made_reviews.reviews(50, 0))
    assert 70 < sum(label for label, _ in first) < 130 and len({text for _, text in first}) > 190


def test_no_made_review_has_both_labels():
    labels = {}
    for label, text in made_reviews.reviews(5000, 3):
        assert labels.setdefault(text, label) == label


def test_made_reviews_are_said_to_be_no_benchmark(caplog):
    with caplog.at_level(logging.WARNING):
        rows = rows_of(Reviews(source=Labelled(rows=20)))
    assert len(rows) == 20 and "no benchmark" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "房间干净\n\n服务热情\n"),
        ("a.csv", "review,date\n房间干净,1\n服务热情,2\n"),
        ("a.tsv", "review\n房间干净\n服务热情\n"),
    ],
    ids=["lines", "csv", "tsv"],
)
def test_reviews_to_predict_need_no_label(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert list(Reviews().inputs(tmp_path / name)) == [{"words": ["房间", "干净"]}, {"words": ["服务", "热情"]}]


def test_jieba_keeps_its_cache_where_no_other_user_can_write(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reviews._cut.cache_clear()
    try:
        assert reviews._cut()("很好吃") and (tmp_path / "whipray" / "jieba" / "jieba.cache").is_file()
    finally:
        reviews._cut.cache_clear()


def test_padding_has_no_influence_on_a_text():
    torch.manual_seed(0)
    network = BiLSTM(20, 4, 5, 2)
    lengths = torch.tensor([6, 1, 3])
    tokens = torch.randint(1, 20, (3, 6)).where(torch.arange(6) < lengths[:, None], 0)
    together = network(tokens, lengths)
    alone = torch.cat([network(tokens[i : i + 1, :n], lengths[i : i + 1]) for i, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(together, alone)
    rubbish = tokens.where(torch.arange(6) < lengths[:, None], 7)
    assert torch.equal(network(rubbish, lengths), together)


def test_both_directions_are_read():
    torch.manual_seed(0)
    network, lengths = BiLSTM(20, 4, 5, 2), torch.tensor([3])
    assert not torch.allclose(network(torch.tensor([[1, 2, 3]]), lengths), network(torch.tensor([[3, 2, 1]]), lengths))


@pytest.mark.parametrize(("dropout", "exact"), [(0.0, True), (0.5, False)])
def test_dropout_is_what_ends_exact_invariance(dropout, exact):
    assert (Reviews(dropout=dropout).invariance == "exact") == exact


def test_metrics_are_accuracy_and_f1():
    assert list(Reviews().metrics({})) == ["accuracy", "f1"]
