"""axe-core in the browser: what is wrong for readers who do not see, or who see little contrast."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from book.screenshots import set_theme

THEMED = ["color-contrast", "link-in-text-block"]
"""The rules that look at colours."""

OTHERS = """
const [themed, done] = arguments;
const article = document.querySelector("article.bd-article") ?? document.body;
const rules = Object.fromEntries(themed.map((rule) => [rule, { enabled: false }]));
axe.run(article, { resultTypes: ["violations"], rules }).then((found) => done(found.violations));
"""

COLOURS = """
const [themed, done] = arguments;
const article = document.querySelector("article.bd-article") ?? document.body;
const background = (element) => {
  const { backgroundColor } = getComputedStyle(element);
  const clear = /, 0\\)$/.test(backgroundColor) && element.parentElement;
  return clear ? background(element.parentElement) : backgroundColor;
};
const looks = new Map();
const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
  const { color, fontSize, fontWeight, opacity } = getComputedStyle(element);
  const look = [color, fontSize, fontWeight, opacity, background(element)].join();
  if (!looks.has(look)) looks.set(look, element);
}
const judged = [...looks.values()].map((element) => element.closest("svg") ?? element);
const around = new Set();
for (const element of judged) for (let e = element; e; e = e.parentElement) around.add(e);
const rest = [];
const collect = (element) => {
  for (const child of element.children) {
    if (!around.has(child)) rest.push(child);
    else if (!judged.includes(child)) collect(child);
  }
};
collect(document.body);
const only = { resultTypes: ["violations"] };
const run = async () => {
  const others = themed.filter((rule) => rule !== "color-contrast");
  const found = await axe.run(article, { ...only, runOnly: others });
  const emptied = rest.filter((element) => !element.matches("style, script")).map((element) => {
    const inside = document.createDocumentFragment();
    inside.append(...element.childNodes);
    return () => element.append(inside);
  });
  const pale = await axe.run({ include: [...looks.values()] }, { ...only, runOnly: ["color-contrast"] });
  emptied.forEach((refill) => refill());
  return [...found.violations, ...pale.violations];
};
run().then(done);
"""
"""Contrast is slow to judge, by all that is on the page: once for each look of text, and the rest emptied."""


@cache
def source() -> str:
    """The script: of the file that SOGRID_AXE names, or of the installed package axe-core-python."""
    file = os.environ.get("SOGRID_AXE") or Path(find_spec("axe_core_python").origin).with_name("axe.min.js")
    return Path(file).read_text(encoding="utf-8")


def serious_findings(driver) -> list[tuple[str, str, int, str]]:
    """Serious and critical findings in the text of the open page: (theme, rule, how often, an element).

    What looks at colours is done in both themes, ending with the light one, and the rest in one. What the
    theme puts around the text is not looked at.
    """
    driver.execute_script(source())
    driver.set_script_timeout(300)
    found = [("any", v) for v in driver.execute_async_script(OTHERS, THEMED)]
    for theme in ("dark", "light"):
        set_theme(driver, theme)
        found += [(theme, v) for v in driver.execute_async_script(COLOURS, THEMED)]
    driver.set_script_timeout(60)
    return [
        (theme, v["id"], len(v["nodes"]), v["nodes"][0]["html"])
        for theme, v in found
        if v["impact"] in ("serious", "critical")
    ]
