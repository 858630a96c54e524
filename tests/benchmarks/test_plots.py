"""The figures of losses: over costs, where no other arm beats those in front in both, and over what is forgotten."""

from benchmarks import plots


def test_the_front_has_what_nothing_beats() -> None:
    points = [(3.0, 0.8), (1.0, 1.0), (2.0, 0.9), (2.5, 0.95), (1.0, 1.1), (4.0, 0.8)]
    assert plots.front(points) == [(1.0, 1.0), (2.0, 0.9), (3.0, 0.8)]
    assert plots.front([]) == []


def test_each_table_has_a_panel_for_each_cost_and_names_its_arms() -> None:
    arms = [
        ("lora", 0.9, {"peak_resident": 2.5, "step_seconds": 3.0, "forgotten": -0.05}),
        ("smt", 0.9, {"peak_resident": 2.0, "step_seconds": 2.0}),
    ]
    figure = plots.pareto({"weights_5": arms})
    panels = figure.get_axes()
    assert [panel.get_xlabel().partition(" (")[0] for panel in panels] == [*plots.COSTS.values()]
    named = [[text.get_text() for text in panel.texts] for panel in panels]
    assert named == [["smt", "lora"], ["smt", "lora"], ["lora"]]
    assert list(panels[0].lines[1].get_xdata()) == [2.0]  # the front: both learn alike, one in less memory


def test_a_curve_leads_from_the_base_to_the_end_of_each_arm() -> None:
    points = [(0.0, 1.2, 4.0), (0.5, 1.0, 3.9), (1.0, 0.9, 4.1)]
    (axes,) = plots.rewinding({"lora": points, "smt": points[:2]}).get_axes()
    assert [list(line.get_xdata()) for line in axes.lines] == [[4.0, 3.9, 4.1], [4.0, 3.9]]
    assert [list(line.get_ydata()) for line in axes.lines] == [[1.2, 1.0, 0.9], [1.2, 1.0]]
    assert [text.get_text() for text in axes.texts] == ["0", "0.5", "1", "0", "0.5"]
