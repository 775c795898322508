from typing import Annotated, Literal

import pytest
from pydantic import Field

from vpmoe.config import Config, apply_overrides, difference, fingerprint, load, merge, resolved
from vpmoe.errors import ConfigError, UsageError


class Plain(Config):
    kind: Literal["plain"] = "plain"
    weight: float = Field(1.0, gt=0)


class Anchored(Config):
    kind: Literal["anchored"] = "anchored"
    anchor: float = Field(0.1, ge=0, le=1)


class Inner(Config):
    width: int
    """How wide."""

    tied: bool | None = None
    ids: tuple[int, ...] = ()


class Defaulted(Config):
    loss: Annotated[Plain | Anchored, Field(discriminator="kind")] = Anchored()


class Recipe(Config):
    loss: Annotated[Plain | Anchored, Field(discriminator="kind")]
    inner: Inner = Inner(width=4)
    effort: Literal["low", "high"] = "low"
    note: str = ""


def _write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def _problems(tmp_path, text, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load(_write(tmp_path, "r.toml", text), Recipe, overrides)
    return [(m.removeprefix(f"{tmp_path}/r.toml: "), hint) for m, hint in caught.value.problems]


def test_file_overrides_and_defaults_meet_in_one_object(tmp_path):
    path = _write(tmp_path, "r.toml", 'effort = "high"\n[loss]\nkind = "anchored"\n')
    recipe = load(path, Recipe, ["loss.anchor=2e-1", "inner.width=8", "note=a b=c"])
    assert resolved(recipe) == {
        "loss": {"kind": "anchored", "anchor": 0.2},
        "inner": {"width": 8, "tied": None, "ids": []},
        "effort": "high",
        "note": "a b=c",
    }


def test_yaml_says_the_same_as_toml(tmp_path):
    toml = _write(tmp_path, "r.toml", '[loss]\nkind = "plain"\nweight = 2.0\n')
    yaml = _write(tmp_path, "r.yaml", "loss:\n  kind: plain\n  weight: 2.0\n")
    assert load(toml, Recipe) == load(yaml, Recipe)


def test_extends_is_relative_to_its_file_and_own_keys_win(tmp_path):
    (tmp_path / "base").mkdir()
    _write(tmp_path, "base/inner.toml", "width = 3\nids = [1, 2]\n")
    path = _write(
        tmp_path, "r.toml", '[loss]\nkind="plain"\n[inner]\nextends="base/inner.toml"\nwidth=5\n'
    )
    assert load(path, Recipe).inner == Inner(width=5, ids=(1, 2))


def test_a_circle_of_extends_is_refused(tmp_path):
    path = _write(tmp_path, "r.toml", 'extends = "r.toml"\n')
    with pytest.raises(ConfigError, match="extends itself"):
        load(path, Recipe)


def test_another_kind_replaces_the_whole_table():
    old = {"loss": {"kind": "plain", "weight": 2.0}}
    assert merge(old, {"loss": {"kind": "anchored"}}) == {"loss": {"kind": "anchored"}}
    assert merge(old, {"loss": {"weight": 3.0}}) == {"loss": {"kind": "plain", "weight": 3.0}}


def test_a_table_without_kind_is_of_the_default_kind(tmp_path):
    path = _write(tmp_path, "r.toml", "")
    assert load(path, Defaulted, ["loss.anchor=0.3"]).loss == Anchored(anchor=0.3)
    assert load(path, Defaulted, ["loss.kind=plain"]).loss == Plain()
    with pytest.raises(ConfigError, match=r"loss\.weight is not a setting of anchored"):
        load(path, Defaulted, ["loss.weight=2"])


def test_override_values_are_toml_else_text():
    tree = apply_overrides({}, ["a=1", "b=x/y.toml", "c=[1, 2]", "d.e=true", "day=2025-06-28"])
    assert tree == {
        "a": 1,
        "b": "x/y.toml",
        "c": [1, 2],
        "d": {"e": True},
        "day": "2025-06-28",
    }


@pytest.mark.parametrize("override", ["seq_len", "=3", "a..b=3"])
def test_a_malformed_override_is_a_usage_error(override):
    with pytest.raises(UsageError, match="is not of the form key=value"):
        apply_overrides({}, [override])


def test_all_errors_come_at_once_with_paths_and_remedies(tmp_path):
    text = 'efort = "low"\neffort = "hihg"\n[loss]\nkind = "anchored"\nanchr = 1\nanchor = 3\n'
    assert _problems(tmp_path, text + "[inner]\nids = [1, 'b']\n") == [
        ("loss.anchor: must be less than or equal to 1 (got 3)", ""),
        ("loss.anchr is not a setting of anchored", "did you mean anchor?"),
        ("inner.width is missing", "add inner.width = ..."),
        ("inner.ids.1: expected a whole number (got 'b')", ""),
        ("effort: 'hihg' is not a choice", "did you mean high?"),
        ("efort is not a setting", "did you mean effort?"),
    ]


@pytest.mark.parametrize("value", ["yes", "'4'", "true", "2.5"])
def test_a_number_is_never_guessed_from_a_flag_or_text(tmp_path, value):
    path = _write(tmp_path, "r.yaml", f"loss: {{kind: plain}}\ninner: {{width: {value}}}\n")
    with pytest.raises(ConfigError, match=r"inner\.width: expected a whole number") as caught:
        load(path, Recipe)
    assert caught.value.hint == "width: How wide."


@pytest.mark.parametrize("value", ["'no'", "0", "1.0"])
def test_a_flag_is_never_guessed_from_text_or_a_number(tmp_path, value):
    path = _write(
        tmp_path, "r.yaml", f"loss: {{kind: plain}}\ninner: {{width: 4, tied: {value}}}\n"
    )
    with pytest.raises(ConfigError, match=r"inner\.tied: expected true or false"):
        load(path, Recipe)


def test_a_whole_number_will_do_for_a_fraction():
    assert Plain.model_validate({"weight": 2}).weight == 2.0


def test_a_key_that_stands_twice_in_yaml_is_refused_as_in_toml(tmp_path):
    path = _write(tmp_path, "r.yaml", "loss: {kind: plain}\nnote: a\nnote: b\n")
    with pytest.raises(ConfigError, match="note stands twice"):
        load(path, Recipe)


def test_a_union_names_its_kinds(tmp_path):
    assert _problems(tmp_path, "") == [("loss is missing", "add [loss]")]
    assert _problems(tmp_path, "[loss]\n") == [("loss.kind is missing", "kinds: anchored, plain")]
    assert _problems(tmp_path, '[loss]\nkind="anchord"\n') == [
        ("loss.kind: there is no kind 'anchord'", "did you mean anchored?")
    ]
    assert _problems(tmp_path, "loss = 3\n") == [("loss: expected a table of settings (got 3)", "")]


def test_unreadable_files_name_the_file_and_the_reason(tmp_path):
    for name, text, said in [
        ("a.toml", "x = ", "Invalid value"),
        ("a.json", "{}", "unknown config format '.json'"),
        ("b.yaml", "- 1\n", "holds no settings"),
    ]:
        with pytest.raises(ConfigError, match=said):
            load(_write(tmp_path, name, text), Recipe)
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "absent.toml", Recipe)


def test_fingerprint_and_difference_see_every_setting():
    one = resolved(Recipe(loss=Plain()))
    two = resolved(Recipe(loss=Plain(weight=2.0)))
    assert fingerprint(one) == fingerprint(dict(reversed(one.items())))
    assert fingerprint(one) != fingerprint(two)
    assert difference(one, two) == ["loss.weight: 1.0 → 2.0"]
    assert difference({"a": 1}, {"b": None}) == ["a: 1 → absent", "b: absent → None"]
