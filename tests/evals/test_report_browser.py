"""The report in a real browser: it opens from the disk without a word of complaint, its pictures show, nothing leaves it."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from engine.evals import Result, charts, report
from engine.evals.result import over_seeds
from tests.browsers import browser
from tests.strict import STRICT

pytestmark = pytest.mark.browser

WEIGHTS = ("runs/maect-20261121-094500", "raw pixels", 'odd <b>"name"</b> & 文字')
WIDTHS = (1280, 390)


def results() -> list[Result]:
    """Three weights by three protocols: figures with samples, seeds and neither, tables, pictures, more columns than fit."""
    rng = np.random.default_rng(0)
    found = []
    for place, name in enumerate(WEIGHTS):
        # the same images are hard for all; the figures' order is not that of the weights
        hits = (np.random.default_rng(1).random(60) < (0.6, 0.9, 0.3)[place]).astype(float)
        found.append(
            Result(
                "knn",
                {"top-1": hits.mean()},
                {"k": 20, "temperature": 0.07, "note": "ours"},
                samples={"top-1": hits},
                pictures={"confusion": charts.confusion(rng.integers(0, 9, (5, 5)))},
                weights=name,
                data="digits",
            )
        )
        runs = [
            Result("linear", {"last-epoch top-1": 0.6 + 0.1 * place, "best-epoch top-1": 0.9}, {}) for _ in range(2)
        ]
        curve = Figure(figsize=(6, 4))
        curve.add_subplot().plot(rng.random(5))
        runs[0].pictures["curve"] = curve
        runs[0].details["by learning rate"] = [{"lr": lr, "top-1": lr} for lr in np.linspace(0.1, 0.9, 15).tolist()]
        found.append(over_seeds([type(run)(**vars(run) | {"weights": name}) for run in runs], (0, 1)))
        figures = {f"a rather long name of figure {n}": 0.1 * n + 0.01 * place for n in range(9)}
        found.append(Result("segmentation", figures, {"long": "x" * 500}, weights=name, data="scenes"))
    return found


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("report") / "a folder"
    found = results()
    commands = {
        (each.weights, each.protocol): f"python -m engine.eval --weights '{each.weights * 8}'" for each in found
    }
    report.write(
        folder,
        found,
        {"seed": 0, "unreadable images left out": [("a/b.png", "truncated")]},
        {},
        STRICT,
        commands=commands,
    )
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def chromium():
    with browser() as running:
        yield running


@pytest.fixture(params=WIDTHS)
def page(request, chromium, address):
    """The report, opened; what goes wrong on the way there or later fails the test."""
    page = chromium.new_page(viewport={"width": request.param, "height": 900})
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda failed: complaints.append(failed.url))
    page.on("request", lambda sent: requests.append(sent.url))
    page.goto(address)
    yield page
    assert not complaints
    assert requests and all(url.startswith(("file:", "data:")) for url in requests)
    page.close()


def width(page) -> int:
    """Of what the page would scroll over."""
    return page.evaluate("document.documentElement.scrollWidth")


def test_it_opens_with_all_its_sections_and_pictures(page):
    assert page.title() == f"{WEIGHTS[0]}, {WEIGHTS[1]} and {WEIGHTS[2]}: evaluation"
    headings = ["Summary", "Differences", "knn", "linear", "segmentation", "How it was run"]
    assert page.locator("h2").all_inner_texts() == headings
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href")).count() == 1
    assert page.locator("nav a").all_inner_texts() == headings
    sizes = page.evaluate("[...document.images].map((each) => [each.complete, each.naturalWidth, each.alt.length])")
    assert len(sizes) == 6 and all(complete and width > 0 and alt > 0 for complete, width, alt in sizes)
    tables = page.locator("table.summary")
    assert tables.count() == 3
    assert tables.first.locator("tbody th").all_inner_texts() == list(WEIGHTS)
    assert page.locator("th[scope=row]:visible").count() > 30 and page.locator("b").count() == 0


def test_nothing_is_wider_than_the_window(page):
    assert width(page) == page.viewport_size["width"]
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert width(page) == page.viewport_size["width"]


def test_a_picture_is_enlarged_and_put_back(page):
    picture = page.locator(".enlarge").nth(1)
    small = picture.locator("img").bounding_box()["width"]
    picture.click()
    dialog = page.locator("dialog")
    assert dialog.is_visible() and dialog.locator("p").inner_text() == f"confusion: {WEIGHTS[1]}, protocol knn"
    shown = dialog.locator("img").bounding_box()["width"]
    assert shown > small or page.viewport_size["width"] == 390
    assert shown <= page.viewport_size["width"] == width(page)
    page.keyboard.press("ArrowRight")
    assert dialog.locator("p").inner_text() == f"confusion: {WEIGHTS[2]}, protocol knn"
    assert dialog.locator("img").count() == 1
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    picture.focus()
    page.keyboard.press("Enter")
    assert dialog.is_visible()
    dialog.get_by_role("button").click()
    assert not dialog.is_visible()


def test_sorting_by_a_figure_orders_the_weights_everywhere(page):
    button = page.locator(".sort").first
    button.click()
    best_first = [WEIGHTS[1], WEIGHTS[0], WEIGHTS[2]]
    for table in page.locator("table.summary").all():
        assert table.locator("tbody th").all_inner_texts() == best_first
    button.click()
    assert page.locator("table.summary").last.locator("tbody th").all_inner_texts() == best_first[::-1]
    assert page.locator("th[aria-sort]").count() == 1


def test_on_paper_everything_is_open(page):
    assert page.locator("details:not([open])").count() > 0
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0
    assert page.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_the_paper_in_light_and_dark(chromium, address, scheme):
    page = chromium.new_page(color_scheme=scheme)
    page.goto(address)
    found = page.evaluate(
        """() => {
          const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          const light = (colour) => {
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((c) => {
              const s = c / 255;
              return s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const style = getComputedStyle(document.documentElement);
          const of = (name) => light(style.getPropertyValue(`--${name}`));
          return Object.fromEntries(["ink", "soft", "accent", "good", "bad"].map((name) => {
            const [low, high] = [of(name), of("paper")].sort((a, b) => a - b);
            return [name, (high + 0.05) / (low + 0.05)];
          }));
        }"""
    )
    # WCAG 2.2, 1.4.3: at least 4.5 to 1
    assert min(found.values()) >= 4.5, found
    page.close()
