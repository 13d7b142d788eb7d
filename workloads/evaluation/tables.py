"""Results as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def perplexity_table(result: dict[str, Any]) -> tuple[str, Table]:
    """A heading, and one row a length; each rule's perplexity with its interval over documents."""
    data, rules = result["data"], result["rules"]
    table = Table(box=None, pad_edge=False)
    heading = (
        f"\nPerplexity of {result['model']['label']} on {data['documents']} documents of {data['name']}, "
        f"{result['confidence']:.0%} intervals over documents"
    )
    subsampled = any(row["windows_scored"] < row["windows"] for row in result["lengths"])
    table.add_column("length", justify="right")
    table.add_column("windows", justify="right")
    for text in rules.values():
        table.add_column(text, justify="right")
        table.add_column("interval", justify="right")
        if subsampled:
            table.add_column("subsampling", justify="right")
    for row in result["lengths"]:
        whole = row["windows_scored"] == row["windows"]
        windows = f"{row['windows']:,}" if whole else f"{row['windows_scored']:,} of {row['windows']:,}"
        cells = [f"{row['length']:,}", windows]
        for rule in rules:
            score = row["rules"][rule]
            several = score["low"] is not None
            cells += [f"{score['perplexity']:,.3f}", f"{score['low']:,.3f} to {score['high']:,.3f}" if several else "-"]
            if subsampled:
                cells.append(f"± {score['subsampling_error']:.1%}")
        table.add_row(*cells)
    return heading, table


def retrieval_table(result: dict[str, Any]) -> tuple[str, Table]:
    """A heading, and one row a length, or a file of LongChat's cases."""
    table = Table(box=None, pad_edge=False)
    heading = f"\n{result['what']}: answers of {result['model']['label']}, {result['confidence']:.0%} Wilson intervals"
    named = any(row["group"] != f"{row['length']} tokens" for row in result["lengths"])
    if named:
        table.add_column("cases")
    for column in ("length", "correct", "accuracy", "interval"):
        table.add_column(column, justify="right")
    for row in result["lengths"]:
        table.add_row(
            *([row["group"]] if named else []),
            f"{row['length']:,}",
            f"{row['correct']} of {row['tests']}",
            f"{row['accuracy']:.0%}",
            f"{row['low']:.0%} to {row['high']:.0%}",
        )
    return heading, table


TABLES = {"perplexity": perplexity_table, "passkey": retrieval_table, "topics": retrieval_table}


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, as printed."""
    if seconds is None:
        return "an unknown time"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
