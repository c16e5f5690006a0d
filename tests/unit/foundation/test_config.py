"""Config: layers, bounds, names, files. A run gets what the user wrote, or all errors are reported at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.configs import HERE, flags, refusal, write_yaml

from kolotune.cli.init import commented_config
from kolotune.foundation import quantization_types
from kolotune.foundation.config import OPTIONS, Config, dump, load_file, plain_values, resolve, stage_options
from kolotune.foundation.errors import ConfigError


def test_defaults_are_those_of_the_class_with_an_absolute_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve() == dataclasses.replace(Config(), output_dir=tmp_path / "outputs")


def test_a_later_layer_overrides_and_none_counts_as_not_given() -> None:
    config = resolve(
        ({"epochs": 5, "seed": 1, "lora_rank": 8}, "saved", HERE),
        ({"epochs": 6, "seed": 2}, "file", HERE),
        flags(epochs=7, seed=None),
    )
    assert (config.epochs, config.seed, config.lora_rank) == (7, 2, 8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("learning_rate", 0.0),
        ("eval_split", 0.0),
        ("weight_decay", 0.0),
        ("warmup_steps", 0),
        ("max_grad_norm", 0.0),
        ("checkpoint_steps", 0),
        ("seed", 0),
        ("system", ""),
        ("compare", False),
        ("train_data", ()),
        ("quantization", ()),
    ],
)
def test_explicit_zeros_and_empty_values_are_kept(name: str, value: Any) -> None:
    before = {"warmup_steps": 9, "system": "x", "train_data": ["a"]}
    assert getattr(resolve((before, "file", HERE), flags(**{name: value})), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", -1),
        ("epochs", 1.5),
        ("epochs", "many"),
        ("learning_rate", -1e-9),
        ("learning_rate", 1.01),
        ("learning_rate", float("nan")),
        ("eval_split", 1),
        ("lora_rank", 0),
        ("lora_rank", 4097),
        ("lora_alpha", 0),
        ("lora_alpha", float("inf")),
        ("lora_dropout", 1.0),
        ("lora_plus_ratio", 0.5),
        ("max_grad_norm", float("inf")),
        ("batch_size", 0),
        ("max_seq_length", 7),
        ("seed", 2**32),
        ("dtype", "f64"),
        ("merge_dtype", "auto"),
        ("engine", "torchtune2"),
        ("scheduler_type", "Cosine"),
        ("skip_bad", "perhaps"),
        ("quantization", 5),
        ("parameter", 5),
        ("train_data", 5),
        ("train_data", [5]),
        ("output_dir", 5),
        ("base_model", ["a"]),
        ("target_modules", 3),
    ],
)
def test_out_of_bounds_is_refused_by_name_and_origin(name: str, value: Any) -> None:
    cause = refusal(flags(**{name: value}))
    assert cause.startswith(f"command line: {name.replace('_', '-')} ")
    assert "\n" not in cause


def test_all_errors_are_reported_at_once_with_their_origin() -> None:
    cause = refusal(
        ({"epochs": -1, "bach_size": 2}, "options.yaml", HERE),
        flags(lora_rank=0, quantization="Q9", parameter=("x",), template_date="yesterday"),
    )
    lines = cause.splitlines()
    assert len(lines) == 6
    for start in (
        "options.yaml: epochs ",
        "options.yaml: unknown option 'bach_size' (did you mean batch_size?)",
        "command line: lora-rank ",
        "quantization: 'Q9'",
        "parameter: 'x'",
        "template-date: 'yesterday'",
    ):
        assert any(line.startswith(start) for line in lines), start


def test_an_unknown_key_that_resembles_nothing_has_no_suggestion() -> None:
    assert refusal(flags(zzzz=1)) == "command line: unknown option 'zzzz'"


@pytest.mark.parametrize("key", ["_component_", "__class__", "hf-token ", "Epochs "])
def test_unknown_keys_are_refused(key: str) -> None:
    assert "unknown option" in refusal(({key: "os.system"}, "file", HERE))


def test_kebab_and_snake_keys(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "batch-size: 2\nlora_rank: 3\nmax-seq-length: 99\n")
    assert load_file(path) == {"batch_size": 2, "lora_rank": 3, "max_seq_length": 99}


def test_relative_paths_of_a_file_start_at_the_file_and_of_flags_at_the_current_folder(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    file = {"train_data": ["a.jsonl"], "eval_data": "e.jsonl", "output_dir": "out", "base_model": "./model"}
    config = resolve((file, "file", there), ({"train_data": ["b.jsonl", "/c.jsonl"]}, "command line", here))
    assert config.train_data == (here / "b.jsonl", Path("/c.jsonl"))
    assert config.eval_data == (there / "e.jsonl",)
    assert config.output_dir == there / "out"
    assert config.base_model == str(there / "model")


def test_a_base_model_is_a_folder_when_there_is_one_but_the_default_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "smollm2-135m").mkdir()

    def base(name: str) -> str:
        return resolve(({"base_model": name}, "command line", tmp_path)).base_model

    assert base("mine") == str(tmp_path / "mine")
    assert base("mine/model") == str(tmp_path / "mine" / "model")
    assert base("owner/model") == "owner/model"
    assert base("smollm2-135m") == "smollm2-135m"
    assert base("~/model") == str(Path.home() / "model")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("q4_k_m", ("Q4_K_M",)),
        ("Q4_K_M,q8_0", ("Q4_K_M", "Q8_0")),
        (" Q4_K_M , Q8_0 , ", ("Q4_K_M", "Q8_0")),
        (["q4_k_m", "Q8_0,q5_0"], ("Q4_K_M", "Q8_0", "Q5_0")),
        ("Q8_0,q8_0", ("Q8_0",)),
        ("none", ("NONE",)),
        ("F16", ("NONE",)),
        ("f16,None", ("NONE",)),
        ("bf16", ("BF16",)),
    ],
)
def test_quantizations_in_any_case_and_in_lists(value: Any, expected: tuple[str, ...]) -> None:
    assert resolve(flags(quantization=value)).quantization == expected


@pytest.mark.parametrize("name", sorted(quantization_types.NEEDS_IMPORTANCE_MATRIX))
def test_quantizations_that_need_a_matrix_say_so(name: str) -> None:
    values = {"quantization": f"Q8_0,{name.lower()}"}
    assert resolve(flags(**values)).quantization == ("Q8_0", name)
    assert f"quantization: {name} needs an importance matrix" in refusal(flags(**values, importance_matrix="never"))
    tried = {"compare_quantization": name.lower(), "importance_matrix": "never"}
    assert f"compare-quantization: {name} needs an importance matrix" in refusal(flags(**tried))


@pytest.mark.parametrize("name", ["none", "Q8_0,f16"])
def test_the_unquantized_model_cannot_be_a_trial(name: str) -> None:
    assert "compare-quantization: " in refusal(flags(compare_quantization=name))


@pytest.mark.parametrize("name", ["Q4", "Q4_K_M.gguf", "../Q8_0", "Q8_0;id", "-Q8_0", "Q4 K M"])
def test_an_unknown_quantization_is_refused_with_the_known_ones(name: str) -> None:
    cause = refusal(flags(quantization=name))
    assert cause.startswith(f"quantization: {name.upper()!r}")
    assert "Q4_K_M" in cause


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"quantization": "none,Q8_0"}, "none"),
        ({"eval_data": "e.jsonl", "eval_split": 0.1}, "eval-split"),
        ({"template_date": "2026-02-30"}, "2026-02-30"),
        ({"output_dir": "a\0b"}, "NUL"),
        ({"train_data": ["a\0b"]}, "NUL"),
        ({"base_model": "a\0b"}, "NUL"),
        ({"use_dora": True, "lora_dropout": 0.1}, "second product"),
        ({"new_token": ["<a>"], "start_from": "adapter"}, "without these tokens"),
        ({"init_lora_weights": "pissa", "start_from": "adapter"}, "start-from"),
        ({"rank_pattern": ["q_proj"]}, "name=value"),
        ({"rank_pattern": ["q_proj=0"]}, "from 1 to 4096"),
        ({"rank_pattern": ["q_proj=2.5"]}, "whole numbers"),
        ({"rank_pattern": ["q_proj=nan"]}, "whole numbers"),
        ({"rank_pattern": ["q_proj=8x"]}, "NAME=NUMBER"),
        ({"rank_pattern": ["(a+)+=8"]}, "NAME=NUMBER"),
        ({"alpha_pattern": ["q_proj=0"]}, "above 0"),
        ({"alpha_pattern": ["=4"]}, "NAME=NUMBER"),
    ],
)
def test_options_that_exclude_each_other(values: dict[str, Any], words: str) -> None:
    assert words in refusal(flags(**values))


def test_patterns_as_a_mapping() -> None:
    config = resolve(flags(rank_pattern={"q_proj": 8}, alpha_pattern={r"layers\.0\..*": 4.5}))
    assert (config.rank_pattern, config.alpha_pattern) == (("q_proj=8",), (r"layers\.0\..*=4.5",))


def test_eval_data_with_the_split_turned_off_is_fine() -> None:
    assert resolve(flags(eval_data="e.jsonl", eval_split=0)).eval_data == (HERE / "e.jsonl",)


def test_a_split_that_was_turned_off_is_saved_beside_eval_data(tmp_path: Path) -> None:
    config = resolve(flags(eval_data="e.jsonl", eval_split=0))
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump(config), encoding="utf-8")
    assert resolve((load_file(saved), "saved", tmp_path)).eval_split == 0


@pytest.mark.parametrize("token", ["hf_AbCdEfGhIjKlMnOp", "hf_" + "x" * 300, "", "hf_a\nb", "hf_a\0b"])
@pytest.mark.parametrize("wrapped", [str, lambda token: [token]])
def test_a_literal_token_is_refused_and_never_repeated(token: str, wrapped: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(({"hf_token": wrapped(token), "epochs": -1}, "command line", tmp_path))
    shown = f"{error.value.cause} {error.value.hint} {error.value!r} {error.value.args}"
    assert "hf-token: takes a file" in shown
    if token:
        assert token not in shown
        assert token[:10] not in shown


def test_a_token_file_is_kept_as_a_path_and_standard_input_as_a_dash(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_secret")
    assert resolve(({"hf_token": "token"}, "file", tmp_path)).hf_token == str(tmp_path / "token")
    assert resolve(({"hf_token": "-"}, "file", tmp_path)).hf_token == "-"


def test_the_dump_leaves_out_the_token_and_options_of_one_call(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_secret")
    config = resolve(({"hf_token": "token", "use_checkpoint": True}, "file", tmp_path))
    text = dump(config)
    assert "hf_token" not in text
    assert "use_checkpoint" not in text


numbers = st.floats(0, 1, exclude_max=True, allow_nan=False)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)
configs_ = st.builds(
    lambda paths, **more: resolve(
        ({"train_data": [Path("/data") / each.replace("/", "_") for each in paths], **more}, "test", HERE)
    ),
    paths=st.lists(names, max_size=3),
    epochs=st.integers(0, 10**6),
    learning_rate=numbers,
    eval_split=numbers,
    weight_decay=numbers,
    lora_alpha=st.floats(1e-12, 1e12),
    lora_dropout=numbers,
    use_rslora=st.booleans(),
    init_lora_weights=st.sampled_from(["default", "pissa", "olora"]),
    rank_pattern=st.lists(st.integers(1, 4096).map(lambda rank: f"q_proj={rank}"), max_size=2),
    lora_plus_ratio=st.floats(1, 1e3),
    neftune_noise_alpha=st.floats(0, 1e3),
    warmup_steps=st.none() | st.integers(0, 10**9),
    system=st.none() | texts,
    parameter=st.lists(texts.map(lambda each: f"stop={each}"), max_size=3).map(tuple),
    quantization=st.lists(st.sampled_from(["Q4_K_M", "Q8_0", "BF16"]), max_size=3),
    target_modules=st.lists(st.sampled_from(["q_proj", "v_proj"]), min_size=1),
    skip_bad=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    template_date=st.none() | st.dates().map(str),
    base_model=st.sampled_from(["smollm2-135m", "owner/name", "/abs/model"]),
)


@given(configs_)
def test_a_dumped_config_loads_unchanged(config: Config) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(dump(config), encoding="utf-8")
        assert resolve((load_file(path), "saved", Path(folder))) == config


@given(st.binary(max_size=200))
def test_any_bytes_in_a_file_load_or_raise_a_config_error(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_bytes(data)
        try:
            resolve((load_file(path), "file", Path(folder)))
        except ConfigError as error:
            assert error.cause


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(OPTIONS)), plain, max_size=5))
def test_any_yaml_value_resolves_or_raises_a_config_error(values: dict[str, Any]) -> None:
    try:
        config = resolve((values, "file", HERE))
    except ConfigError as error:
        assert error.cause
    else:
        assert isinstance(config, Config)
        dump(config)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs: 1\nlora_rank: [1\n", "options.yaml:3: not valid YAML"),
        ("epochs: 1\nseed: 2\nepochs: 3\n", "options.yaml:3: not valid YAML: duplicate key epochs"),
        ("epochs: 1\n\tseed: 2\n", "options.yaml:2: not valid YAML"),
        ("system: !!python/object/apply:os.system ['touch made']\n", "options.yaml:1: not valid YAML"),
        ("system: !!python/name:os.system\n", "not valid YAML"),
        ("- a\n- b\n", "options.yaml: contains no options"),
        ("just words\n", "options.yaml: contains no options"),
        ("template_date: 2026-99-99\n", "not valid YAML"),
        (b"system: \xff\xfe\n", "can't be read"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_bad_files_are_refused_with_their_line(tmp_path: Path, text: str | bytes, words: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        resolve((load_file(write_yaml(tmp_path, text)), "file", tmp_path))
    assert words in error.value.cause
    assert error.value.hint
    assert not (tmp_path / "made").exists()


def test_interpolation_is_text(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SECRET", "planted")
    loaded = load_file(write_yaml(tmp_path, "system: ${oc.env:SECRET} $SECRET `id`\n"))
    config = resolve((loaded, "file", tmp_path))
    assert config.system == "${oc.env:SECRET} $SECRET `id`"
    assert "planted" not in dump(config)


def test_a_byte_order_mark_an_empty_file_and_a_date_are_fine(tmp_path: Path) -> None:
    assert load_file(write_yaml(tmp_path, b"\xef\xbb\xbfepochs: 4\n")) == {"epochs": 4}
    assert load_file(write_yaml(tmp_path, "# nothing\n")) == {}
    assert (
        resolve((load_file(write_yaml(tmp_path, "template_date: 2026-01-02\n")), "", HERE)).template_date
        == "2026-01-02"
    )
    # YAML reads this as text, because it has no point.
    assert resolve((load_file(write_yaml(tmp_path, "learning_rate: 2e-4\n")), "", HERE)).learning_rate == 2e-4


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match="can't be read"):
            load_file(path)


def test_parameters_may_be_a_mapping_in_yaml() -> None:
    config = resolve(({"parameter": {"temperature": 0.7, "top_k": 40}}, "file", HERE))
    assert config.parameter == ("temperature=0.7", "top_k=40")


def test_a_record_holds_plain_values() -> None:
    import json

    found = plain_values(resolve(flags(train_data=["a"])), OPTIONS)
    assert json.loads(json.dumps(found)) == found


def test_each_line_of_the_commented_config_is_valid_and_is_the_default(tmp_path: Path) -> None:
    text = commented_config()
    assert resolve((load_file(write_yaml(tmp_path, text)), "init", tmp_path)).train_data == (tmp_path / "chats.jsonl",)
    named = set()
    for line in text.splitlines():
        if line.startswith("#") and not line.startswith("# "):
            values = load_file(write_yaml(tmp_path, line[1:]))
            named |= set(values)
            config = resolve((values, "init", Path.cwd()))
            assert config == resolve(), line
    assert named == set(OPTIONS) - {"hf_token", "train_data"}


# --- fingerprints


def test_options_younger_than_old_records_are_in_fingerprints_only_where_they_are_given() -> None:
    trained = {
        "use_rslora": True,
        "use_dora": True,
        "init_lora_weights": "pissa",
        "lora_plus_ratio": 4.0,
        "neftune_noise_alpha": 5.0,
    }
    chosen = resolve(flags(**trained, train_on="last"))
    assert not {*trained, "train_on"} & {*stage_options(resolve(), "train"), *stage_options(resolve(), "prepare")}
    assert trained.items() <= stage_options(chosen, "train").items()
    assert stage_options(chosen, "prepare")["train_on"] == "last" and "train_on" not in stage_options(chosen, "train")
