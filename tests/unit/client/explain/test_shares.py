from vlcache.explain.shares import LayerBudget, all_shares, layer_budgets, layer_shares

from tests.unit.client.explain.answers import COLUMNS, ROWS, TEXT, grid, kept

PATCHES = ROWS * COLUMNS
FIRST, SECOND = [4, 1] + [0, 2, 4] + [0] * (PATCHES - 3), [3, 0] + [0, 0, 4] + [0] * (PATCHES - 4) + [1]


def test_a_share_is_one_of_all_heads_of_all_layers():
    what = kept([FIRST, SECOND], grid())
    assert layer_shares(what, 0, grid())[:4] == [0, 0.5, 1, 0]
    assert all_shares(what, grid()) == [0, 0.25, 1] + [0] * (PATCHES - 4) + [0.125]


def test_a_budget_is_the_mean_of_the_heads():
    what = kept([FIRST, SECOND], grid())
    assert layer_budgets(what) == [LayerBudget(visual=1.5, text=1.25), LayerBudget(visual=1.25, text=0.75)]
    assert layer_budgets(what)[0].tokens == 2.75


def test_each_image_has_its_own_tokens():
    second = grid(TEXT + PATCHES + 1)
    what = kept([[*FIRST, 2, *[4] * PATCHES]], grid(), second)
    assert all_shares(what, second) == [1] * PATCHES
    assert layer_budgets(what) == [LayerBudget(visual=1.5 + PATCHES, text=1.75)]


def test_a_prompt_without_images_is_text():
    assert layer_budgets(kept([[4, 2]])) == [LayerBudget(visual=0, text=1.5)]
