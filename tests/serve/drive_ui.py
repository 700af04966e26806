"""Opens the page in headless Chromium, uses its seven tabs and prints what it saw as JSON.

In the environment of the page, which has playwright: python drive_ui.py ADDRESS CHROMIUM FILE FOLDER; screenshots of
each tab are put into the folder.
"""

import json
import re
import sys
from urllib.parse import urlsplit

from playwright.sync_api import sync_playwright

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# Elements that only a text which was taken for HTML can have made.
INJECTED = """() => document.querySelectorAll('.mv script, .mv img[src="x"], .mv strong, .prose strong').length
  + (document.title === 'medvl' ? 0 : 1)"""


class Browser:
    """A page that is open; its own session."""

    def __init__(self, chromium, address, hosts, size=(1440, 1000)):
        self.page = chromium.new_context(viewport={"width": size[0], "height": size[1]}).new_page()
        self.page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        self.page.set_default_timeout(20_000)
        self.page.goto(address)
        self.page.wait_for_selector("#about >> text=Service")

    def open(self, tab):
        self.page.get_by_role("tab", name=tab, exact=True).click()
        self.panel = self.page.locator("[role=tabpanel]:visible")

    def upload(self, path):
        self.panel.locator("input[type=file]").set_input_files(path)
        self.panel.get_by_text("in memory").wait_for()

    def fill(self, label, text):
        self.panel.get_by_label(label).first.fill(text)

    def unfold(self, title):
        self.panel.get_by_role("button", name=title).click()

    def press(self, name):
        self.panel.get_by_role("button", name=name, exact=True).click()

    def answer(self, place, text):
        """The text of an element once it has `text`."""
        found = self.page.locator(place).filter(has_text=text)
        found.wait_for()
        return found.inner_text()


def use_tabs(browser, file, folder):
    """What each tab shows, by its name."""
    seen = {}

    def done(name):
        browser.page.screenshot(path=f"{folder}/{name.split()[0].lower()}.png")
        seen[f"{name}: injected"] = browser.page.evaluate(INJECTED)

    browser.open("Extract")
    browser.upload(file)
    browser.press("Extract")
    seen["Extract"] = browser.answer("#values", "not verified")
    seen["boxes"] = browser.page.locator("#page rect").count()
    # The picture must be as large as its boxes say.
    seen["picture"] = browser.page.evaluate(
        """() => { const image = document.querySelector('#page img'), box = document.querySelector('#page svg');
        return [image.naturalWidth, image.clientWidth - box.clientWidth, image.clientHeight - box.clientHeight] }"""
    )
    done("Extract")
    browser.panel.get_by_label("As a FHIR").check()
    browser.press("Extract")
    for title, place, text in (("JSON", "#json", "labs"), ("FHIR", "#fhir", re.compile("Bundle|status"))):
        browser.unfold(title)
        seen[title] = browser.answer(place, text)
    seen["JSON: injected"] = browser.page.evaluate(INJECTED)

    browser.unfold("Own schema")
    browser.fill("JSON schema", '{"type": "string"}')
    browser.press("Extract")
    seen["fault"] = browser.answer(".fault", "schema")
    seen["values beside a fault"] = browser.page.locator("#values").inner_text()

    browser.open("Analyse")
    browser.upload(file)
    browser.fill("Prompt", "What of Jane Doe?")
    browser.press("Analyse")
    browser.panel.get_by_text("Seconds:").wait_for()
    seen["Analyse"] = browser.panel.get_by_label("Answer").input_value()
    done("Analyse")

    browser.open("CT findings")
    browser.upload(file)
    browser.press("Find")
    seen["CT findings"] = browser.answer("#findings", "Seconds")
    seen["slices"] = browser.page.locator("#findings img").count()
    done("CT findings")

    browser.open("Slides")
    browser.fill("or a slide", "s-1")
    browser.fill("Question", "Which grade?")
    browser.press("Ask")
    seen["Slides"] = browser.answer("#slide", "Seconds")
    done("Slides")

    browser.open("Ask and draw")
    browser.fill("Question", "What is this?")
    browser.upload(file)
    browser.press("Send")
    browser.answer("#conversation", "an image")
    browser.panel.get_by_role("radio", name="Draw").check()
    browser.fill("Question", "A chest")
    browser.press("Send")
    browser.page.locator("#conversation img").wait_for()
    browser.panel.get_by_role("radio", name="Ask").check()
    for turn in ("the first", "the second"):
        browser.panel.get_by_label("Model").fill("toy")
        browser.panel.get_by_label("Model").press("Enter")
        browser.fill("Question", turn)
        browser.press("Send")
        browser.answer("#conversation", f"{turn} (turn")
    seen["Ask and draw"] = browser.answer("#conversation", "the second (turn")
    done("Ask and draw")

    browser.open("Adapters")
    browser.fill("Question", "Which organ?")
    browser.press("Ask")
    seen["Adapters"] = browser.answer("#adapters", "Seconds")
    done("Adapters")

    browser.open("Benchmarks")
    browser.press("Show results and state")
    seen["Benchmarks"] = browser.answer("#benchmarks", "State: ready")
    done("Benchmarks")
    return seen


def use_at_once(first, second):
    """What two users see who ask at the same time."""
    users = (first, "alpha"), (second, "beta")
    for browser, word in users:
        browser.open("Ask and draw")
        browser.panel.get_by_label("Model").fill("toy")
        browser.panel.get_by_label("Model").press("Enter")
        browser.fill("Question", f"{word} {word}")
    for browser, _ in users:
        browser.press("Send")
    return [browser.answer("#conversation", f"{word} (turn") for browser, word in users]


def main(address, executable, file, folder):
    hosts = set()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        browser = Browser(chromium, address, hosts)
        tabs = browser.page.get_by_role("tab").all_inner_texts()
        notice = browser.page.get_by_text("not for diagnosis").first.is_visible()
        seen = use_tabs(browser, file, folder)
        others = [Browser(chromium, address, hosts) for _ in range(2)]
        seen["at once"] = use_at_once(*others)
        sources = [one.page.content() for one in (browser, *others)]
        chromium.close()
    print(json.dumps({"tabs": tabs, "notice": notice, "hosts": sorted(hosts), "sources": sources, **seen}))


if __name__ == "__main__":
    main(*sys.argv[1:])
