"""From episodes to numbers: success per setting and per group, tables, and whether two checkpoints differ.

results["settings"]["Carrot-v1:test"]    episodes, success_once, success_at_end, return, episode_len, wilson_95,
                                         seconds, episode_ids and outcomes (one per episode)
results["means"]["vision"]               mean over the settings of a group; None where one of them was not run
results["other_temperatures"]["0.6"]     settings and means again, where more than one temperature was run
"""

import math
from collections.abc import Iterator

from schemas import UserError
from vla.evaluation.settings import GROUP_OF, GROUPS
from vla.logger import wilson_interval
from vla.text import markdown_code, markdown_text

OUTCOMES = ("success_once", "success_at_end", "return", "episode_len")
# every column says what it is: the published "average of OOD" is the last one
COLUMNS = {
    "in_distribution": "in-distribution",
    "vision": "vision",
    "semantic": "semantic",
    "execution": "execution",
    "mean_of_15_out_of_distribution": "mean of the 15 out-of-distribution settings",
    "mean_of_16_published_average": "mean of all 16 settings (what is published as average of OOD)",
}


def summarize(episodes: list[dict]) -> dict:
    """One setting at one temperature."""
    count = len(episodes)
    means = {name: sum(episode[name] for episode in episodes) / count for name in OUTCOMES}
    return {
        "episodes": count,
        **means,
        "wilson_95": list(wilson_interval(means["success_once"], count)),
        "seconds": round(sum(episode["seconds"] for episode in episodes), 2),
        "episode_ids": [episode["episode_id"] for episode in episodes],
        "outcomes": [{"episode_id": e["episode_id"]} | {name: e[name] for name in OUTCOMES} for e in episodes],
    }


def group_means(rates: dict[str, tuple[float, int]]) -> dict[str, dict | None]:
    """Success rate and number of episodes by setting -> the columns of the table.

    Every setting counts alike. None where a setting of the column was not run. The interval is that of the pooled
    episodes, which is a little too wide where settings differ in difficulty.
    """
    members = {**GROUPS}
    members["mean_of_15_out_of_distribution"] = tuple(name for name in GROUP_OF if GROUP_OF[name] != "in_distribution")
    members["mean_of_16_published_average"] = tuple(GROUP_OF)
    means: dict[str, dict | None] = {}
    for column in COLUMNS:
        chosen = [rates[name] for name in members[column] if name in rates]
        if len(chosen) < len(members[column]):
            means[column] = None
            continue
        rate, episodes = sum(rate for rate, _ in chosen) / len(chosen), sum(count for _, count in chosen)
        means[column] = {
            "success_once": rate,
            "settings": len(chosen),
            "episodes": episodes,
            "wilson_95": list(wilson_interval(rate, episodes)),
        }
    return means


def assemble(episodes: dict[float, dict[str, list[dict]]], about: dict) -> dict:
    """Everything that results.json holds.

    Args:
        episodes: by temperature (the first is the one that `settings` shows) and setting.
        about: what was evaluated, how and where; stands first.
    """
    parts = {}
    for temperature, by_setting in episodes.items():
        settings = {name: summarize(rows) for name, rows in by_setting.items()}
        means = group_means({name: (one["success_once"], one["episodes"]) for name, one in settings.items()})
        parts[temperature] = {"settings": settings, "means": means}
    first, *others = parts
    return {
        **about,
        "temperature": first,
        **parts[first],
        "other_temperatures": {str(temperature): parts[temperature] for temperature in others},
    }


def by_temperature(results: dict) -> Iterator[tuple[float, dict]]:
    """(temperature, {"settings", "means"}) of a results.json, the first temperature first."""
    yield results["temperature"], results
    for temperature, part in results["other_temperatures"].items():
        yield float(temperature), part


# ---------------------------------------------------------------------- published numbers
def published_means(row: dict) -> dict[str, dict | None]:
    """A row of benchmarks/published.yaml -> the same columns as ours, from its counts of successes.

    A row has counts per group, or per setting; every setting of it has `episodes_per_setting` episodes.
    """
    n, counts = row["episodes_per_setting"], row["successes"]
    if "settings" in row:
        return group_means({name: (count / n, n) for name, count in row["settings"].items()})
    spread = {name: (counts[group] / n / len(names), n) for group, names in GROUPS.items() for name in names}
    return group_means(spread)


# ---------------------------------------------------------------------- tables
def percent(rate: float, interval: list[float] | None = None) -> str:
    text = f"{100 * rate:.1f}"
    return text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def temperature_name(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def means_table(results: dict, published: dict[str, dict]) -> list[list[str]]:
    """Header and rows of the table in the published column order; published rows below ours.

    A column that no row has is left out; [] where that is all of them: some settings were run, and no whole group.
    """
    rows = {f"{results['name']}, {temperature_name(t)}": part["means"] for t, part in by_temperature(results)}
    rows |= {row["name"]: published_means(row) for row in published.values()}
    columns = [column for column in COLUMNS if any(means[column] for means in rows.values())]
    if not columns:
        return []
    table = [["success_once, percent", *(COLUMNS[column] for column in columns)]]
    for name, means in rows.items():
        found = [means[column] for column in columns]
        cells = ["not run" if mean is None else percent(mean["success_once"], mean["wilson_95"]) for mean in found]
        table.append([name, *cells])
    return table


def settings_table(results: dict) -> list[list[str]]:
    """Header and one row per setting and temperature, in the order of the published table."""
    header = ["setting", "group", "sampling", "episodes", "success_once %", "success_at_end %", "return", "length"]
    table = [[*header, "seconds"]]
    for name in sorted(results["settings"], key=lambda name: [*GROUP_OF, name].index(name)):
        for temperature, part in by_temperature(results):
            one = part["settings"][name]
            table.append(
                [
                    name,
                    GROUP_OF.get(name, "other").replace("_", "-"),
                    temperature_name(temperature),
                    str(one["episodes"]),
                    percent(one["success_once"], one["wilson_95"]),
                    percent(one["success_at_end"]),
                    f"{one['return']:.3f}",
                    f"{one['episode_len']:.1f}",
                    f"{one['seconds']:.1f}",
                ]
            )
    return table


def markdown_table(table: list[list[str]]) -> str:
    """A table of plain text as Markdown: no cell ends a cell, a row, or is a tag."""
    if not table:
        return ""
    header, *rows = [[markdown_text(cell) for cell in row] for row in table]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def headline(results: dict) -> str:
    """One line per temperature: success over all episodes that were run."""
    lines = []
    for temperature, part in by_temperature(results):
        settings = part["settings"].values()
        count = sum(one["episodes"] for one in settings)
        rate = sum(one["success_once"] * one["episodes"] for one in settings) / count
        lines.append(
            f"success {percent(rate, list(wilson_interval(rate, count)))} % (success_once, {count} episodes of "
            f"{len(settings)} settings, {temperature_name(temperature)})"
        )
    return "\n".join(lines)


def markdown(results: dict, published: dict[str, dict]) -> str:
    """results.md: means in the published column order, then setting by setting."""
    notes = "\n".join(
        "- " + markdown_text(f"{row['name']}: {row['note']} Source: {row['source']}") for row in published.values()
    )
    return (
        "\n\n".join(
            part
            for part in (
                f"# {markdown_text(results['name'])}",
                headline(results),
                "Brackets are 95 % Wilson intervals. A mean counts every setting alike.",
                markdown_table(means_table(results, published)),
                notes,
                markdown_table(settings_table(results)),
                f"{markdown_code(results['command'])} on {results['num_ranks']} ranks of {results['device']}, commit "
                f"{results['commit']}, {results['started']}",
            )
            if part
        )
        + "\n"
    )


# ---------------------------------------------------------------------- do two checkpoints differ
def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value (McNemar 1947, by the binomial distribution): episodes in which one alone succeeded."""
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return min(1.0, 2 * tail)


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for being many (Holm 1979): any of them is falsely below 0.05 in 5 % of comparisons."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def compare(first: dict, second: dict) -> list[dict]:
    """Two results.json -> one row per setting and temperature that both have, paired by episode id.

    Raises:
        UserError: they were run in different worlds, or share no episode.
    """
    worlds = [half["world"] for half in (first, second)]
    for key in {**worlds[0], **worlds[1]}:
        values = [world.get(key, "unknown") for world in worlds]
        if values[0] != values[1] and key != "asset_dir":  # older files have this place of one machine
            said = f"--compare: the two were evaluated with {key} {values[0]} and {values[1]}"
            raise UserError(f"{said}: evaluate one of them again")
    rows, theirs = [], dict(by_temperature(second))
    for temperature, part in by_temperature(first):
        for name, one in part["settings"].items():
            other = theirs.get(temperature, {"settings": {}})["settings"].get(name)
            if other is not None:
                rows.append({"setting": name, "temperature": temperature} | compare_setting(one, other))
    rows = [row for row in rows if row["episodes"]]
    if not rows:
        raise UserError("--compare: the two have no setting, temperature and episode in common")
    for row, p_value in zip(rows, holm([row["p"] for row in rows])):
        row |= {"p_holm": p_value, "differs": p_value < 0.05}
    return rows


def compare_setting(one: dict, other: dict) -> dict:
    """The episodes that both ran."""
    successes = [{row["episode_id"]: bool(row["success_once"]) for row in half["outcomes"]} for half in (one, other)]
    pairs = [(successes[0][i], successes[1][i]) for i in successes[0] if i in successes[1]]
    count, only_first, only_second = len(pairs), pairs.count((True, False)), pairs.count((False, True))
    rates = [sum(pair[side] for pair in pairs) / max(count, 1) for side in (0, 1)]
    return {
        "episodes": count,
        "success_once": rates,
        "wilson_95": [list(wilson_interval(rate, max(count, 1))) for rate in rates],
        "only_first": only_first,
        "only_second": only_second,
        "p": mcnemar(only_first, only_second),
    }


def comparison_table(rows: list[dict], names: tuple[str, str]) -> list[list[str]]:
    """Header and rows; a row says whether the two differ."""
    header = ["setting", "sampling", "episodes", f"{names[0]} %", f"{names[1]} %", "only the first", "only the second"]
    table = [[*header, "p (McNemar)", "p (Holm)", "verdict"]]
    for row in rows:
        better = names[row["success_once"][1] > row["success_once"][0]]
        table.append(
            [
                row["setting"],
                temperature_name(row["temperature"]),
                str(row["episodes"]),
                *(percent(rate) for rate in row["success_once"]),
                str(row["only_first"]),
                str(row["only_second"]),
                f"{row['p']:.3g}",
                f"{row['p_holm']:.3g}",
                f"{better} is better" if row["differs"] else "no difference shown",
            ]
        )
    return table
