"""The figure of losses over costs: which arms no other beats in both."""

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
