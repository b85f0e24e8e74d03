"""One typed path: what is set where, and what a person reads who mistypes it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given as anything
from hypothesis import strategies as st

from distributed import config, optimizers
from distributed.config import Given
from distributed.run import check_names, resolve
from tasks.errors import UserError

SHAPES = str(Path(__file__).parents[1] / "shapes.py")


def refused(task: str, *words: str) -> UserError:
    with pytest.raises(UserError) as raised:
        resolve(task, config.from_words(words))
    return raised.value


BAD = [
    ("optimizer.rl=0.1", "unknown setting 'optimizer.rl' (command line)", "did you mean 'optimizer.lr'?"),
    ("optimizer.l=0.1", "unknown setting 'optimizer.l'", "optimizer.lr"),
    ("optimiser.lr=0.1", "unknown setting 'optimiser.lr'", "did you mean 'optimizer.lr'?"),
    ("lr=0.1", "unknown setting 'lr'", "did you mean 'optimizer.lr'?"),
    ("trainin.epochs=1", "unknown setting 'trainin.epochs'", "did you mean 'train.epochs'?"),
    ("optimizer.lr=abc", "optimizer.lr=abc (command line): expected a number, above 0, got 'abc'", ""),
    ("optimizer.lr=-1", "expected a number, above 0", ""),
    ("optimizer.lr=nan", "expected a number, above 0", ""),
    ("train.epochs=2.5", "expected a whole number, at least 1", ""),
    ("train.epochs=0", "expected a whole number, at least 1", ""),
    ("optimizer.name=adamm", "optimizer.name=adamm (command line): unknown optimizer 'adamm'", "did you mean 'adam'?"),
    (
        "optimizer.momentum=0.9",
        "'optimizer.momentum' (command line) is not used: optimizer.name is adam",
        "sgd or rmsprop",
    ),
    ("schedule.gamma=0.1", "'schedule.gamma' (command line) is not used: schedule.name is onecycle", "step"),
    ("schedule.name=cosin", "schedule.name=cosin (command line): unknown schedule 'cosin'", "did you mean 'cosine'?"),
    ("task.modle=mlp", "unknown setting 'task.modle' of this task", "did you mean 'task.model'?"),
    ("task.model=mpl", "task.model=mpl (command line): expected cnn or mlp", "did you mean 'mlp'?"),
    ("data.order=lenght", "expected shuffle or length or sequential", "did you mean 'length'?"),
    ("optimizer.generator.lr=1", "the task has no entry 'generator'", "this task has one optimizer"),
    ("train.epochs", "'train.epochs' is not understood", "name=value"),
    (
        "optimizer.name=torch.optim:Adamm",
        "optimizer.name=torch.optim:Adamm (command line): module 'torch.optim' has no 'Adamm'",
        "did you mean 'Adam'?",
    ),
    ("optimizer.name=torch.optimm:Adam", "(command line): cannot import 'torch.optimm'", ""),
    ("averaging.name=emma", "averaging.name=emma (command line): unknown average 'emma'", "did you mean 'ema'?"),
    ("data.split_seed=99999999999999999999", "expected a whole number, at least 0, at most 9223372036854775807", ""),
    ("data.split_seed=-1", "expected a whole number, at least 0", ""),
]


@pytest.mark.parametrize(("word", "message", "hint"), BAD)
def test_a_wrong_setting_is_refused_with_its_place_and_the_nearest_name(word, message, hint):
    error = refused("digits", word)
    assert message in error.message
    assert hint in error.hint


def test_a_setting_given_twice_is_refused():
    with pytest.raises(UserError, match="given twice"):
        config.from_words(["train.epochs=1", "train.epochs=2"])


def test_values_come_from_defaults_recipe_file_and_command_line_in_this_order(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("optimizer:\n  lr: 5e-3\n  eps: 1.0e-7\ntask.width: 16\n")
    run = resolve("digits", {**config.from_yaml(file), **config.from_words(["optimizer.lr=0.5"])})
    assert run.optimizers["model"].lr == 0.5
    assert run.task.width == 16
    origins = {
        name: run.origins[name]
        for name in ("optimizer.lr", "optimizer.eps", "task.width", "optimizer.name", "train.seed")
    }
    assert origins == {
        "optimizer.lr": "command line", "optimizer.eps": f"{file}:3", "task.width": f"{file}:4",
        "optimizer.name": "recipe", "train.seed": "default",
    }  # fmt: skip


def test_a_wrong_value_in_a_file_is_named_with_its_line(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("train:\n  epochs: many\n")
    with pytest.raises(UserError, match=r"settings.yaml:2\): expected a whole number"):
        resolve("digits", config.from_yaml(file))


YAML = {
    "a Python object": ("a: !!python/object/apply:os.system ['true']", "tags such as !!python/object/apply:os.system"),
    "a tag": ("train.epochs: !!bool maybe", "tags such as !!bool"),
    "a tab": ("train:\n\tepochs: 1", "indent with spaces"),
    "a doubled key": ("train.epochs: 1\ntrain: {epochs: 2}", "given twice"),
    "a bare word": ("epochs", "expected names with values"),
    "an alias": ("a: &a 1\nb: *a", ":2: aliases such as *a are not read"),
    "a bomb of lists": ("a: &a [1]\nb: [" + "*a, " * 200 + "*a]", "aliases such as *a"),
    "a bomb of maps": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}\n" for i in range(1, 26)),
        "aliases",
    ),
    "an alias within itself": ("a: &a {b: *a}", "aliases such as *a"),
    "bottomless maps": ("{a: " * 20_000, "is nested more than 20 deep"),
    "bottomless lists": ("a: " + "[" * 20_000, "is nested more than 20 deep"),
    "a number to the base of 60": ("data:\n  split: 8:1:1", "put quotes around it: '8:1:1'"),
    "one in a list": ("a: [8:1]", "put quotes around it: '8:1'"),
    "a day that is none": ("a: 2026-13-45", "a ("),
    "a list as a name": ("? [a]\n: 1", "expected a name"),
    "not closed": ("train: {epochs: 1", "expected ',' or '}'"),
}


@pytest.mark.parametrize("name", YAML)
def test_what_is_no_plain_yaml_is_refused_with_its_line(tmp_path, name):
    text, words = YAML[name]
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as raised:
        config.from_yaml(file)
    assert words in str(raised.value)
    assert str(file) in raised.value.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.epochs: yes", "expected a whole number, at least 1, got True"),
        ("optimizer.lr: on", "expected a number, above 0, got True"),
        ("train.clip_norm: yes", "expected a number, above 0 or none, got True"),
        ("{schedule.name: multistep, schedule.milestones: [yes, 2]}", "expected a list of numbers, got [True, 2]"),
    ],
)
def test_a_yes_is_no_number(tmp_path, text, expected):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match="put quotes around") as raised:
        resolve("digits", config.from_yaml(file))
    assert expected in raised.value.message


def test_a_yes_is_true_where_that_is_meant(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("{optimizer: {name: sgd, nesterov: yes, momentum: 0.9}, data.split: '8:1:1'}")
    run = resolve("digits", config.from_yaml(file))
    assert run.optimizers["model"].nesterov is True
    assert run.data.split == "8:1:1"


def test_a_setting_without_a_default_must_be_given(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from tasks.digits import Digits\nclass Taught(Digits):\n    teacher: str  # RUN whose network is imitated\n"
    )
    error = refused(f"{file}:Taught")
    assert error.message == "task.teacher must be given: RUN whose network is imitated"
    assert error.hint == "write task.teacher=..., text"
    assert resolve(f"{file}:Taught", config.from_words(["task.teacher=first"])).task.teacher == "first"


def test_no_written_without_quotes_is_explained():
    with pytest.raises(UserError, match="put quotes around"):
        resolve("digits", {"optimizer.name": Given(False, "x.yaml:1")})


@anything(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,5}(\.[a-z]{1,5})?", fullmatch=True),
        st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.booleans(), st.none(), st.text("abc 1:#'\"\n-"),
                  st.lists(st.integers())),
        max_size=4,
    )
)  # fmt: skip
def test_what_is_written_as_yaml_is_read_back_equal(tmp_path_factory, values):
    groups = {name.partition(".")[0] for name in values if "." in name}
    values = {name: value for name, value in values.items() if name not in groups}
    file = tmp_path_factory.mktemp("yaml") / "x.yaml"
    file.write_text(config.to_yaml(values))
    assert {name: given.value for name, given in config.from_yaml(file).items()} == values


def test_a_runs_own_settings_resolve_to_the_same_run(tmp_path):
    words = ["optimizer.name=sgd", "optimizer.momentum=0.9", "schedule.name=multistep", "schedule.milestones=1,0.5"]
    run = resolve("digits", config.from_words(words))
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(run.values))
    assert resolve("digits", config.from_yaml(file)).values == run.values
    assert resolve("digits", run.givens()).values == run.values


def test_settings_of_another_task_are_refused(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(resolve("digits", {}).values))
    with pytest.raises(UserError, match="are not of 'housing'"):
        resolve("housing", config.from_yaml(file))


def test_each_of_several_optimizers_has_its_own_settings():
    words = [
        "optimizer.lr=0.5",
        "optimizer.generator.lr=0.1",
        "optimizer.discriminator.name=sgd",
        "optimizer.discriminator.momentum=0.5",
    ]
    run = resolve(f"{SHAPES}:Adversarial", config.from_words(words))
    assert run.optimizers["generator"].lr == 0.1
    assert run.optimizers["generator"].name == "adam"
    assert run.optimizers["discriminator"].lr == 0.5
    assert run.optimizers["discriminator"].momentum == 0.5
    assert "has no entry 'generatr'" in refused(f"{SHAPES}:Adversarial", "optimizer.generatr.lr=1").message
    assert "momentum" in refused(f"{SHAPES}:Adversarial", "optimizer.generator.momentum=1").message


def test_any_optimizer_class_brings_its_own_settings():
    run = resolve("digits", config.from_words(["optimizer.name=torch.optim:NAdam", "optimizer.momentum_decay=0.01"]))
    assert run.optimizers["model"].momentum_decay == 0.01


def test_the_settings_of_any_optimizer_class_have_the_types_of_its_constructor():
    name = "optimizer.name=torch.optim:NAdam"
    words = [name, "optimizer.betas=0.8,0.99", "optimizer.foreach=true", "optimizer.weight_decay=0.1"]
    made = optimizers.create(
        resolve("digits", config.from_words(words)).optimizers["model"], [torch.nn.Parameter(torch.zeros(1))]
    )
    assert {one: made.defaults[one] for one in ("betas", "foreach", "weight_decay", "eps")} == {
        "betas": (0.8, 0.99), "foreach": True, "weight_decay": 0.1, "eps": 1e-8,
    }  # fmt: skip
    assert (
        "optimizer.betas=0.8 (command line): expected a list of 2 numbers"
        in refused("digits", name, "optimizer.betas=0.8").message
    )
    assert "expected true or false or none" in refused("digits", name, "optimizer.foreach=maybe").message


def test_an_optimizer_class_without_types_is_set_by_its_defaults(tmp_path, monkeypatch):
    (tmp_path / "untyped.py").write_text(
        "class Own:\n"
        "    def __init__(self, params, lr, needed, betas=(0.9, 1), weight_decay=0, history=5, amsgrad=False, mode='a',\n"
        "                 fused=None, rate=None, hook=print, **more):\n"
        "        self.given = {name: value for name, value in locals().items() if name not in ('self', 'params')}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = "optimizer.name=untyped:Own"
    assert refused("digits", name).message == "optimizer.needed must be given: a value"
    words = {"needed": "1e-3", "betas": "0.8,2", "weight_decay": "0.1", "history": "7", "amsgrad": "yes", "mode": "b",
             "fused": "true", "rate": "[1, 2]"}  # fmt: skip
    run = resolve("digits", config.from_words([name, *(f"optimizer.{key}={word}" for key, word in words.items())]))
    given = optimizers.create(run.optimizers["model"], []).given
    assert {key: given[key] for key in words} == {
        "needed": 1e-3, "betas": (0.8, 2), "weight_decay": 0.1, "history": 7, "amsgrad": True, "mode": "b",
        "fused": True, "rate": [1, 2] if isinstance(given["rate"], list) else (1, 2),
    }  # fmt: skip
    assert given["hook"] is print


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # float16 has its own way of leaving steps out.
        (["train.max_skipped=2", "precision.dtype=float16"], "the loss scaler skips steps already"),
        (["train.unfreeze=layer4@2"], "train.unfreeze=layer4@2: nothing is frozen"),
    ],
)
def test_settings_that_mean_nothing_together_are_refused_before_any_data_are_read(words, message):
    with pytest.raises(UserError, match=message):
        resolve("digits", config.from_words(words))
    resolve("digits", config.from_words([words[-1], "train.freeze=layer4"]))


def test_a_period_of_the_cosine_has_a_shortest_length():
    assert (
        "schedule.restart=1e-07 (command line): expected a number, at least 1e-06 or none"
        in refused("digits", "schedule.name=cosine", "schedule.restart=1e-07").message
    )


def test_misspelt_machinery_is_answered_without_torch():
    code = (
        "import sys; from distributed import config, catalogue; from distributed.run import check_names\n"
        "from tasks.errors import UserError\n"
        "for call in (lambda: check_names(config.from_words(['optimizer.rl=1'])), lambda: catalogue.check('digts')):\n"
        "    try: call()\n"
        "    except UserError as error: print(error.hint)\n"
        "print(sorted({'torch', 'ray', 'pydantic', 'pyarrow'} & set(sys.modules)))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert told.stdout.splitlines() == ["did you mean 'optimizer.lr'?", "did you mean 'digits'?", "[]"]


def test_every_setting_of_the_machinery_says_what_it_means():
    from distributed.run import machinery

    silent = [name for name, settings in machinery().items() if not all(one.meaning for one in settings)]
    assert silent == []


def test_names_are_checked_without_a_task():
    check_names(config.from_words(["optimizer.discriminator.lr=1", "task.anything=1", "schedule.milestones=1"]))
