"""What tells runs apart is named once, in the words people type."""

from collections.abc import Callable

from sweeper import naming
from sweeper.record import LEFT_OUT
from sweeper.spec import RunSpec, to_mapping

Make = Callable[..., RunSpec]


def test_only_what_varies_by_itself_is_named(make_spec: Make) -> None:
    specs = [
        to_mapping(make_spec(placement={"name": name, "roles": [role]}, rank=rank, seed=seed))
        for name, role in (("q", "attn_q"), ("k", "attn_k"))
        for rank in (4, 8)
        for seed in (0, 1)
    ]
    assert naming.varying(specs) == ["seed"]
    assert naming.label(specs[1], ["seed"]) == "q r4 seed=1"


def test_a_field_that_varies_inside_a_group_is_named(make_spec: Make) -> None:
    specs = [to_mapping(make_spec(placement={"layers": layers})) for layers in ("all", "lower_half")]
    assert naming.varying(specs) == ["placement.layers"]
    specs = [to_mapping(make_spec(optim={"lr": lr}, alpha=alpha)) for lr in (1e-3, 1e-4) for alpha in (8, 16)]
    assert naming.varying(specs) == ["alpha", "optim.lr"]


def test_equal_runs_have_nothing_to_name(make_spec: Make) -> None:
    assert naming.varying([to_mapping(make_spec())]) == []
    assert naming.varying([]) == []


def test_a_field_that_plain_data_leave_out_at_its_default_is_named_all_the_same(make_spec: Make) -> None:
    specs = [to_mapping(make_spec()), to_mapping(make_spec(objective={"name": "focal"}))]
    assert naming.varying(specs) == ["objective"]
    assert [naming.label(spec, ["objective"]).split()[-1] for spec in specs] == ["objective=nll", "objective=focal"]


def test_what_plain_data_leave_out_is_what_a_spec_has_at_its_default(make_spec: Make) -> None:
    spec = make_spec()
    known = {"objective": spec.objective.name, "sharing": spec.sharing.name}
    known |= {
        f"sharing.{name}": getattr(spec.sharing, name)
        for name in ("elasticity", "experts", "router", "kept", "tied", "balance")
    }
    known |= {"trainer.deterministic": spec.trainer.deterministic, "evaluation.conflict": spec.evaluation.conflict}
    assert known == LEFT_OUT
    assert not [field for field in LEFT_OUT if field.split(".")[-1] in str(to_mapping(spec))]


def test_an_order_that_the_seed_draws_tells_no_runs_apart(make_spec: Make) -> None:
    parts = [{"name": name, "family": "jsonl", "path": "x.jsonl"} for name in ("one", "two", "three")]
    dataset = {"name": "sequence", "family": "sequence", "parts": parts, "options": {"order": "seed"}}
    plain = [to_mapping(make_spec(dataset=dataset, seed=seed)) for seed in range(4)]
    assert len({tuple(part["name"] for part in spec["dataset"]["parts"]) for spec in plain}) > 1
    assert naming.varying(plain) == ["seed"]
