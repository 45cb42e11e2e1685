"""From overrides to specs: the grid, its identity, its errors and its speed."""

import itertools
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf

from sweeper import config
from sweeper.errors import Problems
from sweeper.spec import canonical_json

BASE = ["model=tiny_llama"]


def cells(found: config.Composition) -> list[tuple[str, int]]:
    return [(spec.placement.name, spec.rank) for spec in found.specs]


def problems(overrides: list[str], composer: Any) -> tuple[str, ...]:
    with pytest.raises(Problems) as caught:
        config.expand([*BASE, *overrides], composer)
    return caught.value.lines


def test_comma_lists_are_every_combination_once(composer: Any) -> None:
    found = config.expand([*BASE, "placement=attn,ff,full", "rank=4,8,16"], composer)
    assert cells(found) == list(itertools.product(["attn", "ff", "full"], [4, 8, 16]))
    assert len({spec.run_id for spec in found.specs}) == 9


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["rank=4,8", "rank=16"], r"rank is there twice: rank=4,8 and rank=16\. Give one of them\."),
        (["placement=attn", "placement=attn,ff", "placement=full"], "placement is there 3 times: placement=attn and "),
        (["optim.lr=interval(1e-4,1e-2)", "optim.lr=1e-3"], "optim.lr is there twice"),
    ],
)
def test_an_axis_that_is_typed_twice_shows_both(typed: list[str], line: str, composer: Any) -> None:
    with pytest.raises(Problems, match=line):
        config.expand([*BASE, *typed], composer, typed=typed)


def test_a_value_may_be_typed_twice_and_presets_anew(composer: Any) -> None:
    """Of single values the last counts; what is typed replaces a preset's axis."""
    typed = ["rank=4", "rank=8"]
    assert [spec.rank for spec in config.expand([*BASE, *typed], composer, typed=typed).specs] == [8]
    preset = ["placement=attn,ff,full", "rank=4,8,16"]
    found = config.expand([*BASE, *preset, "rank=2"], composer, typed=["rank=2"])
    assert [(spec.placement.name, spec.rank) for spec in found.specs] == [("attn", 2), ("ff", 2), ("full", 2)]


@pytest.mark.parametrize(
    ("axis", "ranks"),
    [
        ("rank=choice(2,4)", [2, 4]),
        ("rank=range(1,4)", [1, 2, 3]),
        ("rank=8,8,4", [8, 4]),
        ("rank=range(start=4,stop=9,step=4)", [4, 8]),
    ],
)
def test_discrete_sweeps_are_axes(axis: str, ranks: list[int], composer: Any) -> None:
    assert [spec.rank for spec in config.expand([*BASE, axis], composer).specs] == ranks


def test_glob_picks_options(composer: Any) -> None:
    found = config.expand([*BASE, "placement=glob(ff*)"], composer)
    assert [spec.placement.name for spec in found.specs] == ["ff", "ff_in", "ff_out"]


def test_group_options_compose_as_alone(composer: Any) -> None:
    """Sections put together for a grid equal those Hydra composes one by one."""
    axes = ["placement=attn,ff,full", "model=tiny_llama,tiny_gpt2", "rank=4,8", "optim.lr=1e-3,1e-4"]
    found = config.expand(axes, composer)
    assert len(found.specs) == 24
    for spec, overrides in zip(found.specs, (arm.overrides for arm in found.arms), strict=True):
        assert config.from_config(composer.compose(overrides), composer.loader)[0] == spec


def test_an_overlay_can_be_an_axis_with_groups(composer: Any) -> None:
    found = config.expand(["experiment=smoke", "placement=attn,ff", "optim.lr=1e-3,1e-2"], composer)
    assert {spec.model.name for spec in found.specs} == {"tiny_llama"}
    assert found.settings.study == "smoke"
    assert len(found.specs) == 4


def test_default_written_or_not_is_the_same_run(composer: Any) -> None:
    plain, written = (
        config.expand([*BASE, *extra], composer).specs[0] for extra in ([], ["rank=8", "alpha=16", "seed=0"])
    )
    assert plain.run_id == written.run_id
    assert plain.alpha == 16


def test_a_field_at_its_default_is_no_part_of_the_identity(composer: Any) -> None:
    plain, other = (
        config.expand([*BASE, *extra], composer).specs[0] for extra in ([], ["trainer.activation_checkpointing=true"])
    )
    assert "activation_checkpointing" not in canonical_json(plain)
    assert '"activation_checkpointing":true' in canonical_json(other)


def test_alpha_follows_the_rank_unless_given(composer: Any) -> None:
    assert [s.alpha for s in config.expand([*BASE, "rank=4,8"], composer).specs] == [8, 16]
    assert [s.alpha for s in config.expand([*BASE, "rank=4,8", "alpha=32"], composer).specs] == [32, 32]


def test_device_tracking_and_study_leave_the_run_alone(composer: Any) -> None:
    extra = ["trainer.device=cuda:1", "tracking=tensorboard", "study=other", "sweep.max_pack=2"]
    found = config.expand([*BASE, *extra], composer)
    assert found.specs == config.expand(BASE, composer).specs
    assert (found.settings.device, found.settings.tracking, found.settings.study) == ("cuda:1", "tensorboard", "other")


def test_layers_can_be_a_list_or_a_name(composer: Any) -> None:
    found = config.expand([*BASE, "placement.layers=[0,2],first:2,all"], composer)
    assert [spec.placement.layers for spec in found.specs] == [(0, 2), "first:2", "all"]


def test_interpolated_values_follow_the_axis(composer: Any) -> None:
    found = config.expand([*BASE, "optim.lr=1e-3,1e-4", "optim.weight_decay=${optim.lr}", "rank=4,8"], composer)
    assert [spec.optim.weight_decay for spec in found.specs] == [1e-3, 1e-3, 1e-4, 1e-4]


def test_added_fields_are_axes_too(composer: Any) -> None:
    found = config.expand([*BASE, "+method.options.note=a,b"], composer)
    assert [spec.method.options for spec in found.specs] == [{"note": "a"}, {"note": "b"}]


def test_an_added_field_that_nothing_uses_is_refused(composer: Any) -> None:
    for overrides in (["+foo=1"], ["+foo=1,2"], ["++foo.bar=1", "placement=attn,ff"], ["+foo=tag(tune,choice(1,2))"]):
        (line,) = problems(overrides, composer)
        assert "foo: no such field. Choose from allocation, alpha, dataset, " in line
    with pytest.raises(Problems, match="foo: no such field"):
        config.from_config(composer.compose([*BASE, "+foo=1"]), composer.loader)


def test_an_added_field_can_be_what_others_are_interpolated_from(composer: Any) -> None:
    overrides = [*BASE, "+rate=2e-3", "optim.lr=${rate}", "rank=2,4"]
    assert [spec.optim.lr for spec in config.expand(overrides, composer).specs] == [2e-3, 2e-3]
    assert config.from_config(composer.compose(overrides[:-1]), composer.loader)[0].optim.lr == 2e-3


def test_the_last_word_counts(composer: Any) -> None:
    assert [s.rank for s in config.expand([*BASE, "rank=1,2", "rank=3"], composer).specs] == [3]
    assert [s.rank for s in config.expand([*BASE, "rank=3", "rank=1,2"], composer).specs] == [1, 2]


def test_everything_wrong_is_told_at_once(composer: Any) -> None:
    lines = problems(
        ["placement=attn,atn", "rank=0,abc,4", "optim.lrr=3", "seed=-1", "trainer.precision=fp16"], composer
    )
    text = "\n".join(lines)
    assert "placement=atn: no such placement. Choose from all, attn, " in text
    assert "Did you mean attn?" in text
    assert "rank must be at least 1, got 0" in lines
    assert "rank must be a whole number, got abc" in lines
    assert "optim.lrr: no such field. Choose from optim.beta1" in text
    assert "trainer.precision must be one of auto, float32, bfloat16, got fp16" in lines
    assert any(line.startswith("seed must be in") for line in lines)
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["rnk=4,8"], "rnk: no such field. Choose from"),
        (["rank=["], "rank=[: cannot be read"),
        (["method=3"], "method=3: no such method. Choose from"),
        (["method.options.ratio=3"], "method.options.ratio: no such field; method.options has none here."),
        (["model=gpt2", "model.config={layers: 3}"], "model.config has no keys yet; where it takes any, they are"),
        (["optim={lrr: 3}"], "optim.lrr: no such field. Choose from optim.beta1, "),
        (["+tracking.every_steps=2"], "tracking.every_steps: tracking=none has no fields. Choose tracking=mlflow"),
        (
            ["model=gpt2", "+model.config={n_layer: 3}"],
            "model.config.n_layer: model=gpt2 comes with a config of its own",
        ),
        (
            ["trainer.patience=2"],
            "trainer.patience=2 counts evaluations while a run trains: give evaluation.every_steps",
        ),
        (["optim.lr=interval(2,1)"], "a range goes from a lower to a higher number, got 2 to 1"),
        (["optim.lr=tag(log,interval(0,1))"], "a range on a log scale starts above 0, got 0"),
        (["optim.lr=interval(-1,1)"], "optim.lr must be a positive number, got -1.0"),
        (["seed=tag(tune,choice(1,2))"], "seed is not tuned"),
        (["placement=interval(0,1)"], "placement is a group of options"),
        (["placement=tag(tune,choice(attn,atn))"], "placement=atn: no such placement"),
        (["study=a,b"], "is no axis of a grid"),
        (["trainer.device=cpu,cuda"], "is no axis of a grid"),
        (["study=../up"], "study=../up: not a folder name"),
        (["study=/abs"], "not a folder name"),
        (["trainer.device=gpu"], "Choose from auto, cpu, cuda, cuda:N"),
        (["dataset=jsonl"], "dataset.path is required for dataset=jsonl: give dataset.path=..."),
        (["model=path"], "model.location is required for model=path"),
        (
            ["experiment=null"],
            "experiment=null: no such experiment. Choose from continual, lattice, methods, multi_task, paper, "
            "placement_grid, smoke",
        ),
        (["rank=true"], "rank must be a whole number, got true"),
        (["rank=range(3,3)"], "there is no value in this axis. Give a list: rank=a,b,c"),
        (["rank=range(1,5,0)"], "rank=range(1,5,0): range() arg 3 must not be zero"),
        (["rank=interval(2,4)"], "rank from 2 to 4: not every number is whole. Write 'rank=int(interval(2,4))'"),
        (["placement=glob(zz*)"], "placement=glob(zz*): there is no value in this axis. Choose from all, attn, "),
        (["placement=[attn,ff]"], "placement: a run has one option of this group"),
        (["placement={size:3}"], "placement.size: no such field. Choose from placement.embeddings, "),
        (["study=ä"], "study=ä: cannot be read. Letters beyond ASCII need quotes of their own: 'study=\"ä\"'"),
        (["hydra.sweeper.confirm_seeds=3,4"], "a list is 'hydra.sweeper.confirm_seeds=[3,4]'"),
        (["rank="], "rank must be a whole number, got nothing"),
        (["optim.max_grad_norm=inf"], "optim.max_grad_norm must be a finite number, got inf"),
        (["optim.weight_decay=0,nan"], "optim.weight_decay must be a finite number, got nan"),
        (["optim.eps=0"], "optim.eps must be above 0, got 0.0"),
        (["evaluation.every_steps=-1"], "evaluation.every_steps must be at least 0, got -1"),
        (["evaluation.splits=test"], "evaluation.splits must be a list, got test: write 'evaluation.splits=[test]'"),
        (["dataset.max_new_tokens=-1"], "dataset.max_new_tokens must be at least 0, got -1"),
        (["sweep=3"], "sweep must be a mapping, got 3"),
        (["sweep.max_pack=many"], "sweep.max_pack must be a whole number, got many"),
        (["sweep.compile=fast"], "sweep.compile must be one of auto, on, capture, off, got fast"),
        (["hydra/launcher=nope"], "hydra/launcher=nope: no such hydra/launcher. Choose from basic"),
        (["hydra/launcher=rq"], "rq comes with pip install hydra-rq-launcher."),
        (["rank", "=", "8"], "rank =: no spaces around the equals sign: 'rank=8'"),
        (["rank", "=8"], "rank =8: no spaces around the equals sign: 'rank=8'"),
        (["rank=4,", "8"], "rank=4, 8: no spaces in a list: 'rank=4,8'"),
        (["rank=(4,8)"], "Several values are 'rank=4,8' with -m, one list is 'rank=[4,8]'"),
        (["lr=1e-3"], "lr: no such field. Choose from allocation, "),
        (["max_length=3"], " Did you mean dataset.max_length=3?"),
        (["+lr=1e-3"], " Did you mean optim.lr?"),
        (["method=LoRA"], "Did you mean lora?"),
        (
            ["model=org/name"],
            "given as 'model=path model.location=org/name', one of the hub with model.source=hub beside",
        ),
        (["model=./mine"], "no such model. A folder is given as 'model=path model.location=./mine'."),
        (["dataset=mine.jsonl"], "no such dataset. A file is given as 'dataset=file dataset.path=mine.jsonl'."),
    ],
)
def test_each_mistake_has_its_line(overrides: list[str], line: str, composer: Any) -> None:
    found = problems(overrides, composer)
    assert len(found) == 1
    assert line in found[0]
    assert "\n" not in found[0]


def test_a_number_names_a_study_too(composer: Any) -> None:
    assert config.expand([*BASE, "study=2026"], composer).settings.study == "2026"


def test_overlays_must_agree_on_settings(composer: Any) -> None:
    overlays = "experiment=smoke,placement_grid"
    assert len(config.expand([overlays, "model=tiny_llama", "study=one"], composer).specs) == 2
    assert "must be the same over the whole grid" in problems([overlays], composer)[0]


def test_a_job_configuration_gives_the_same_run(composer: Any) -> None:
    cfg = composer.compose([*BASE, "rank=4"])
    with_hydra = OmegaConf.merge({"hydra": {"job": {"id": "???"}}}, cfg)
    spec, settings = config.from_config(with_hydra, composer.loader)  # type: ignore[arg-type]
    assert spec == config.expand([*BASE, "rank=4"], composer).specs[0]
    assert settings.study == "default"


def test_ten_thousand_runs_in_seconds(composer: Any) -> None:
    start = time.perf_counter()
    axes = ["placement=attn,ff,full,attn_q,attn_qv", "rank=range(1,11)", "optim.lr=1e-4,3e-4,1e-3,3e-3"]
    found = config.expand([*BASE, *axes, "seed=range(0,50)"], composer)
    assert len({spec.run_id for spec in found.specs}) == 10_000
    assert time.perf_counter() - start < 10


def test_a_range_gives_way_to_the_methods_own_where_it_is_tagged(composer: Any) -> None:
    """LoRA keeps the range that is asked for, full fine-tuning and BitFit have theirs; defaults lie inside."""
    lines = ["optim.lr=tag(log,method,interval(1e-4,1e-2))", "method=lora,full_ft,bitfit", "rank=4,8"]
    found = config.expand(lines, composer)
    ranges = {arm.default.method.name: (arm.space[0].low, arm.space[0].high) for arm in found.arms}
    assert ranges == {"lora": (1e-4, 1e-2), "full_ft": (1e-5, 1e-3), "bitfit": (1e-3, 1e-1)}
    rates = {arm.default.method.name: arm.default.optim.lr for arm in found.arms}
    assert rates == {"lora": 1e-3, "full_ft": 5e-5, "bitfit": 1e-2}
    assert all(arm.default_params is not None for arm in found.arms)
    given = config.expand(["optim.lr=tag(log,interval(1e-4,1e-2))", "method=lora,full_ft"], composer)
    assert {(arm.space[0].low, arm.space[0].high) for arm in given.arms} == {(1e-4, 1e-2)}
    overridden = config.expand([*lines, "optim.lr=3e-4"], composer)
    assert {arm.default.optim.lr for arm in overridden.arms} == {3e-4}


def test_a_grid_moves_to_the_methods_own_range_where_it_is_tagged(composer: Any) -> None:
    """Full fine-tuning in the paper's grid searches rates a tenth of LoRA's, as many and as far apart."""
    grid = "choice(1e-4,3e-4,1e-3,3e-3,1e-2)"
    methods = "method=lora,full_ft,lora_plus,bitfit"
    found = config.expand([f"optim.lr=tag(tune,method,{grid})", methods, "rank=4"], composer)
    assert {arm.default.method.name: arm.space[0].choices for arm in found.arms} == {
        "lora": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        "full_ft": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
        "lora_plus": (2e-5, 6e-5, 2e-4, 6e-4, 2e-3),
        "bitfit": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    }
    given = config.expand([f"optim.lr=tag(tune,{grid})", methods, "rank=4"], composer)
    assert {arm.space[0].choices for arm in given.arms} == {(1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
    words = config.expand(["trainer.batch_size=tag(tune,method,choice(4,8))", methods, "rank=4"], composer)
    assert {arm.space[0].choices for arm in words.arms} == {(4, 8)}


def test_the_papers_grid_searches_each_methods_own_rates(composer: Any) -> None:
    """With LoRA's rates full fine-tuning would have looked worse than it is."""
    plain = yaml.safe_load((Path(__file__).parents[2] / "conf/experiment/paper.yaml").read_text())
    params = [f"{key}={value}" for key, value in plain["hydra"]["sweeper"]["params"].items()]
    found = config.expand([*params, "rank=4", "placement=attn", "method=lora,full_ft"], composer)
    rates = {arm.default.method.name: arm.space[0].choices for arm in found.arms}
    assert rates["lora"] == (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    assert rates["full_ft"] == (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)


def test_a_learning_rate_on_the_command_line_wins_over_the_methods(composer: Any) -> None:
    (spec,) = config.expand(["method=full_ft", "optim.lr=1e-4"], composer).specs
    assert spec.optim.lr == 1e-4


REGULAR_EXPRESSIONS = [
    r"mlp\.up_proj", r"layers\.0\.", "^model", "_proj$", "(q|k)_proj", "[qk]_proj", "(?:up|down)_proj", r"\d+\.mlp",
    "[a-z]{1,4}_proj", "[^.]+_proj", r"mlp\.(?!up)", "q_proj|k_proj", "(?P<part>mlp)", r"[\w, :]+proj", "mlp#?", "a'b",
    r"\(",
]  # fmt: skip


@pytest.mark.parametrize("expression", REGULAR_EXPRESSIONS)
def test_every_regular_expression_has_a_form_that_hydra_reads(expression: str, composer: Any) -> None:
    lines = [
        "allocation=pattern", f'allocation.pattern=["{expression}:4","attn_q:2"]',
        f'model.roles=["attn_q:{expression}"]', "placement=custom", f'placement.patterns=["{expression}"]',
    ]  # fmt: skip
    (spec,) = config.expand([*BASE, *lines], composer).specs
    assert spec.allocation.pattern == {expression: 4, "attn_q": 2}
    assert spec.model.roles == {"attn_q": expression}
    assert spec.placement.patterns == (expression,)
    assert config.from_config(composer.compose([*BASE, *lines]), composer.loader)[0] == spec


def test_a_list_of_pairs_is_the_mapping(composer: Any) -> None:
    """The same run, with the same identity; and an axis as any other value."""
    mapping, pairs = r"allocation.pattern={attn_q: 16, layers\.0\.: 4}", r"allocation.pattern=[attn_q:16,layers\.0\.:4]"
    one, other = (config.expand([*BASE, "allocation=pattern", given], composer).specs[0] for given in (mapping, pairs))
    assert one == other
    assert one.run_id == other.run_id
    axis = config.expand([*BASE, "allocation=pattern", 'allocation.pattern=["[qk]_proj:4"],["mlp:8"]'], composer)
    assert [spec.allocation.pattern for spec in axis.specs] == [{"[qk]_proj": 4}, {"mlp": 8}]


@pytest.mark.parametrize("quote", ['"', "'"])
@pytest.mark.parametrize("key", ["attn_q", r"layers\.[0-3]\.(mlp|self_attn)\.", "a,b", "x{2}"])
def test_quoted_keys_are_read(key: str, quote: str, composer: Any) -> None:
    """As a shell passes them on; what Hydra can read by itself stays as it was typed."""
    typed = f"allocation.pattern={{{quote}{key}{quote}: 16, attn_v: 4}}"
    words = config.unquoted([*BASE, "allocation=pattern", typed])
    assert words[:-1] == [*BASE, "allocation=pattern"]
    (spec,) = config.expand(words, composer).specs
    assert spec.allocation.pattern == {key: 16, "attn_v": 4}
    assert config.unquoted(["a={b: 'c:d'}", "rank=4,8", 'x="{y: 1}"']) == ["a={b: 'c:d'}", "rank=4,8", 'x="{y: 1}"']


def test_roles_are_given_with_or_without_a_plus(composer: Any) -> None:
    for given in (
        "model.roles={attn_q: q}",
        "+model.roles={attn_q: q}",
        "+model.roles.attn_q=q",
        "model.roles=[attn_q:q]",
    ):
        assert config.expand([*BASE, given], composer).specs[0].model.roles == {"attn_q": "q"}
    assert config.expand([*BASE, "model.roles={}"], composer).specs[0] == config.expand(BASE, composer).specs[0]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ('allocation.pattern={"mlp\\.up": 8}', "Hydra has no quoted keys: write 'allocation.pattern={mlp\\.up: 8}'"),
        ('allocation.pattern={a: 2, "(a|b)": 8}', 'no quoted keys: write \'allocation.pattern=["a:2","(a|b):8"]\''),
        ("allocation.pattern={(a|b): 8}", "no quoted keys: write 'allocation.pattern=[\"(a|b):8\"]'"),
        ("allocation.pattern=[(a|b):8]", "quotes of their own: 'allocation.pattern=[\"(a|b):8\"]'"),
        ("allocation.pattern=[attn_q:x]", "allocation.pattern.attn_q must be a whole number, got x"),
        ("allocation.pattern={attn_q: true}", "allocation.pattern.attn_q must be a whole number, got true"),
        ("allocation.pattern=[attn_q]", "attn_q is not of the form 'role or regular expression:rank'"),
        ("allocation.pattern=[a:1,a:2]", "allocation.pattern: a is there twice"),
        ("allocation.pattern=attn_q:3", "must be a mapping, got attn_q:3: write 'allocation.pattern=[\"attn_q:3\"]'"),
        ("optim.max_grad_norm=choice(null,1)", "no null in choice(): write 'optim.max_grad_norm=null,1'"),
        ("optim.max_grad_norm=choice(1, null)", "no null in choice(): write 'optim.max_grad_norm=1, null'"),
        ("rank=tag(tune,choice(null,1))", "no null in choice(): make it an axis, 'rank=null,1'"),
        ("rank.x=3", "rank.x: rank is one value without fields. Give it as rank=..."),
        ("model.roles.attn_q=q", "model.roles has no keys yet; where it takes any, they are added with '+model.roles"),
    ],
)
def test_what_hydra_cannot_read_is_answered_with_what_it_can(override: str, line: str, composer: Any) -> None:
    pattern = [] if override.startswith("allocation.pattern") else ["allocation.pattern={attn_q: 4}"]
    (found,) = problems(["allocation=pattern", *pattern, override], composer)
    assert line in found
    assert "\n" not in found
    if "write '" in found or "axis, '" in found or "their own: '" in found:  # what is advised can be read
        composer.parse(found[found.rindex(" '") + 2 : -1])


def test_null_in_a_comma_list_is_an_axis(composer: Any) -> None:
    found = config.expand([*BASE, "optim.max_grad_norm=null,1"], composer)
    assert [spec.optim.max_grad_norm for spec in found.specs] == [None, 1.0]


def _overrides_shown(page: Path) -> list[str]:
    """Every override in the commands that a page or the comments of a YAML file show, and every quoted one."""
    text = re.sub(r"\\\n(#|    )?", "", page.read_text())
    commands = re.findall(r"python train\.py (?!-sc)([^\n`]+)", text) + re.findall(r"^#   (\S+=.+)$", text, re.M)
    words = [word for command in commands for word in shlex.split(command, comments=True)]
    words += re.findall(r"'([+~]?[a-z_.]+=[^'`]*)'", text)
    return [word for word in words if re.match(r"[+~]*[a-z_./]+=", word) and "..." not in word]


def test_every_override_in_conf_and_docs_can_be_read(root: Path, composer: Any) -> None:
    pages = [*root.glob("conf/**/*.yaml"), *root.glob("docs/*.md"), root / "README.md"]
    shown = [(page.name, word) for page in pages for word in _overrides_shown(page)]
    assert len(shown) > 80
    unread = []
    for name, word in shown:
        try:
            composer.parse(*config.unquoted([word]))
        except HydraException:
            unread.append((name, word))
    assert unread == []
