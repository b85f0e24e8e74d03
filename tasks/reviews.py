"""Sentiment of Chinese reviews: jieba cuts text into words, and an LSTM reads the words' numbers."""

import functools
import logging
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt
from torch import nn

from tasks import cache
from tasks.bundled import made_reviews
from tasks.classifier import Classifier
from tasks.formats import inputs, table
from tasks.networks import text
from tasks.task import BadRow, Example, Facts, FilePath, Label, Load, Metric, Source, Tokens

STOP_WORDS = Path(__file__).parent / "bundled" / "stopwords_zh.txt"
UNKNOWN = 1  # the number of every word without one of its own; 0 pads

log = logging.getLogger("whipray")


@dataclass(frozen=True, kw_only=True)
class Labelled(Source):
    """A CSV or TSV file with a column `label` (0 negative, 1 positive) and a column of text."""

    column: str = "review"  # name of the column that holds the text
    delimiter: str = ""  # character between the cells; empty: a tab in .tsv files, else a comma
    quotes: bool = True  # quotes around a cell may hold the delimiter; false: a quote is a character like any other
    encoding: str = "utf-8"  # or gb18030 ...; a byte order mark decides over it
    stop_words: FilePath = ""  # file of words to leave out, one a line; empty: the Chinese ones that come with whipray
    max_words: Annotated[int, Ge(1)] = 60  # words a review; the rest is cut off
    min_count: Annotated[int, Ge(1)] = 2  # times that a word must occur in the training rows to get a number
    vocabulary: Annotated[int, Ge(1)] = 20_000  # most frequent words that get a number
    rows: Annotated[int, Ge(1)] = 2_000  # reviews to make where `path` is empty
    seed: int = 0  # of the reviews made


class Reviews(Classifier):
    """Sentiment of Chinese reviews: a text -> negative or positive.

    task.source.path is a file of labelled reviews such as weibo_senti_100k or ChnSentiCorp. Where it is empty, reviews
    are made from templates: good for trying things out, and no benchmark. Accuracy on the made ones, in 2 s on one
    core: 99 %; logistic regression on their words 70 %, on words and pairs of words 80 %.
    """

    source: Labelled = Labelled()
    width: Annotated[int, Ge(1)] = 64  # numbers that stand for a word
    hidden: Annotated[int, Ge(1)] = 64  # units of each direction of the LSTM
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0  # share of a word's and a text's numbers left out in training

    fields = {"tokens": Tokens(), "label": Label(names=("negative", "positive"))}
    recipe = {
        "train.epochs": 8, "data.batch_size": 32, "data.order": "length", "optimizer.name": "adam",
        "optimizer.lr": 5e-3, "schedule.name": "onecycle",
    }  # fmt: skip

    @property
    def invariance(self) -> str:  # type: ignore[override]
        return "dropout draws its numbers a worker; task.dropout=0 is exact" if self.dropout else "exact"

    def files(self) -> list[Path]:
        return [*super().files(), Path(self.source.stop_words or STOP_WORDS)]

    def examples(self, source: Source) -> Iterable[Example]:
        if not self.source.path:
            log.warning("the reviews are made from templates: no benchmark; task.source.path=FILE reads real ones")
            made = made_reviews.reviews(self.source.rows, self.source.seed)
            return (Example((number, str(label), review)) for number, (label, review) in enumerate(made, 1))
        records = self._records(Path(self.source.path), ("label", self.source.column))
        return (Example((line, cells["label"], cells[self.source.column])) for line, cells in records)

    def row(self, reference: tuple[int, str, str]) -> dict[str, Any]:
        line, label, review = reference
        place = f"{self.source.path or 'made reviews'}, line {line}"
        if label.strip() not in ("0", "1"):
            problem = f"unknown label '{label[:40]}', expected 0 or 1" if label.strip() else "the label is missing"
            raise BadRow(f"{place}: {problem}")
        if not review.strip():
            raise BadRow(f"{place}: the text is empty")
        return {"words": self._words(review), "label": int(label)}

    def facts(self, rows: Iterable[Mapping[str, Any]]) -> Facts:
        """The vocabulary, word -> number from 2 on (0 pads, 1 is any other word), and the classes."""
        counts: Counter[str] = Counter()
        labels, longest = [], 0
        for row in rows:
            counts.update(row["words"])
            labels.append(row["label"])
            longest = max(longest, len(row["words"]))
        often = [word for word, count in counts.items() if count >= self.source.min_count]
        often.sort(key=lambda word: (-counts[word], word))
        vocabulary = {word: number for number, word in enumerate(often[: self.source.vocabulary], UNKNOWN + 1)}
        return {
            "tokens": {"vocabulary": vocabulary, "longest": longest},
            "label": self.fields["label"].facts(labels),
        }

    def encode(self, row: dict[str, Any], facts: Facts) -> dict[str, Any]:
        vocabulary = facts["tokens"]["vocabulary"]
        # A text of nothing but stop words still is one word long: an LSTM needs something to read.
        numbers = [vocabulary.get(word, UNKNOWN) for word in row["words"]] or [UNKNOWN]
        return {"tokens": numbers, "label": row["label"]} if "label" in row else {"tokens": numbers}

    def network(self, facts: Facts, load: Load) -> nn.Module:
        words = len(facts["tokens"]["vocabulary"]) + UNKNOWN + 1
        return text.BiLSTM(words, self.width, self.hidden, 2, self.dropout)

    def metrics(self, facts: Facts) -> dict[str, Metric]:
        from tasks import metrics

        return {"accuracy": metrics.accuracy(), "f1": metrics.f1(2)}

    def inputs(self, path: Path) -> Iterable[dict[str, Any]]:
        """Reads the lines of a text file, or the column of text of a .csv or .tsv file."""
        if {".csv", ".tsv"} & set(path.suffixes):
            reviews = [cells[self.source.column] for _, cells in self._records(path, (self.source.column,))]
        else:
            reviews = inputs.lines(path, self.source.encoding)
        return ({"words": self._words(review)} for review in reviews)

    def _records(self, path: Path, needed: tuple[str, ...]) -> Iterable[tuple[int, dict[str, str]]]:
        options = {"delimiter": self.source.delimiter, "encoding": self.source.encoding, "quotes": self.source.quotes}
        return table.records(path, needed, **options)

    def _words(self, review: str) -> list[str]:
        """Cuts a text into words, in one spelling of width and case, without stop words."""
        left_out = _stop_words(Path(self.source.stop_words or STOP_WORDS))
        words = [word.strip() for word in _cut()(_one_spelling(review))]
        return [word for word in words if word and word not in left_out][: self.source.max_words]


def _one_spelling(review: str) -> str:
    return unicodedata.normalize("NFKC", review).lower()


@functools.cache
def _stop_words(path: Path) -> frozenset[str]:
    return frozenset(_one_spelling(line.strip()) for line in table.text(path).splitlines())


@functools.cache
def _cut() -> Callable[[str], list[str]]:
    """Returns jieba's function from a text to its words; loading its dictionary takes most of a second."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba 0.42 imports what setuptools has deprecated
        import jieba
    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()
    # By default its cache is a file in /tmp that it unmarshals, whoever put it there.
    tokenizer.tmp_dir = str(cache.folder("jieba"))
    cache.folder("jieba").mkdir(parents=True, exist_ok=True)
    return tokenizer.lcut
