from __future__ import annotations

import struct
from pathlib import Path

from cluster.language.keep_chart import draw_plan
from cluster.language.keep_table import format_keep_plan
from schemas.keep_trial import KeepPlan
from tests.cluster.language.keep_plans import candidate, loss, make_plan


def lines_of(plan: KeepPlan, width: int = 110) -> list[str]:
    return format_keep_plan(plan, width).splitlines()


def cells_of(lines: list[str], start: str) -> list[str]:
    (found,) = (line for line in lines if line.startswith(start))
    return found[len(start) :].split()


def test_a_line_has_the_figures_of_a_candidate() -> None:
    lines = lines_of(make_plan())
    assert cells_of(lines, "top 50") == [
        *["50.0", "202.0", "224.4", "15.00", "0.250", "15.0°", "4.0", "0.016"],
        *["123", "MB", "1.0", "h"],
    ]
    assert cells_of(lines, "  renormalised") == ["17.00", "0.250", "17.0°", "4.0"]
    # Infinite, and a number of five digits.
    assert "∞" in cells_of(lines, "hybrid 27+28")
    assert "98,304" in cells_of(lines, "dense")
    text = "\n".join(lines)
    assert "perplexity 22.50, ECE 3.1 %, 512 tokens/s on 1 thread of a CPU; time with 2 actors" in text
    assert "cost" not in text


def test_without_a_terminal_a_line_has_at_most_a_hundred_columns() -> None:
    lines = lines_of(make_plan(), 100)
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("top 50") and line.rstrip().endswith("1.0 h") for line in lines)


def test_a_cost_is_shown_where_it_is_known() -> None:
    policies = [candidate({"kind": "top_k", "k": 5}, [loss("ghost_kl", 0.1)], gpu_hours=2.0, cost=5.0)]
    lines = lines_of(make_plan(candidates=policies, device="cuda", gpus_per_actor=1))
    assert cells_of(lines, "top 5")[-1] == "5.00"
    assert any("tokens/s on a GPU" in line for line in lines)


def test_what_a_cpu_cannot_tell_of_gpus_is_said() -> None:
    text = format_keep_plan(make_plan(gpus_per_actor=1))
    assert "no GPU here" in text
    priced = make_plan(gpus_per_actor=1, device="cuda")
    assert "gpu_hour_price" in format_keep_plan(priced)


def test_several_codecs_have_a_table_and_a_row_of_panels_each(tmp_path: Path) -> None:
    policy = {"kind": "top_k", "k": 5}
    both = [candidate(policy, [loss("ghost_kl", 0.1)], codec=codec) for codec in ("packed", "compact")]
    plan = make_plan(candidates=both)
    lines = lines_of(plan)
    starts = [line.rstrip() for line in lines if line.startswith(("codec p", "codec c", "top 5"))]
    assert [line.partition("  ")[0] for line in starts] == ["codec packed", "top 5", "codec compact", "top 5"]
    draw_plan(plan, tmp_path / "both.png")
    draw_plan(make_plan(candidates=both[:1]), tmp_path / "one.png")
    assert size_of(tmp_path / "both.png")[1] > 1.5 * size_of(tmp_path / "one.png")[1]


def test_times_are_short() -> None:
    times = {41.0: "41 s", 130.0: "2.2 min", 750.0: "12 min", 9000.0: "2.5 h", 360000.0: "100 h"}
    for seconds, written in times.items():
        one = candidate({"kind": "top_k", "k": 5}, [loss("ghost_kl", 0.1)], wall_s=seconds)
        (line,) = (line for line in lines_of(make_plan(candidates=[one])) if line.startswith("top 5"))
        assert line.rstrip().endswith(f" {written}")


def test_names_are_never_read_as_markup() -> None:
    text = format_keep_plan(make_plan(teacher="[bold]x[/bold]", corpus_names=["[red]"]))
    assert "[bold]x[/bold]" in text
    assert "[red]" in text


def size_of(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_the_picture_grows_with_the_teachers(tmp_path: Path) -> None:
    plan = make_plan()
    draw_plan(plan, tmp_path / "one.png")
    two = plan.model_copy(update={"trials": plan.trials * 2})
    draw_plan(two, tmp_path / "two.png")
    (width, height), (same, taller) = size_of(tmp_path / "one.png"), size_of(tmp_path / "two.png")
    assert width == same > 800
    assert taller > 1.5 * height


def test_there_is_no_picture_without_a_teacher(tmp_path: Path) -> None:
    draw_plan(KeepPlan(run="run", gpu_hour_price=None, trials=()), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_dense_policy_alone_can_be_drawn(tmp_path: Path) -> None:
    dense = candidate({"kind": "dense"}, [loss("unbiased_kl", 0.0)], is_recipe=True)
    draw_plan(make_plan(candidates=[dense]), tmp_path / "dense.png")
    assert size_of(tmp_path / "dense.png")[0] > 800
