"""A report as Markdown: everything but its plots."""

from __future__ import annotations

from .blocks import Block, Code, Paragraph, Section, Table


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(map(_cell, head)) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(_cell, r)) + " |" for r in rows])


def _block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return text
        case Table(head, rows):
            return _table(head, rows)
        case Code(text):
            return f"```\n{text.strip()}\n```"
    return ""


def write_parts(title: str, sections: list[tuple[str, list[tuple[str, list[Block]]]]]) -> str:
    """Each section over one or several runs' blocks, those of several under their own names."""
    lines = [f"# {title}"]
    for heading, parts in sections:
        lines.append(f"## {heading}")
        for name, blocks in parts:
            lines += [f"### {name}"] if len(parts) > 1 else []
            lines += [text for b in blocks if (text := _block(b))]
    return "\n\n".join(lines) + "\n"


def write(title: str, sections: list[Section]) -> str:
    return write_parts(title, [(s.title, [("", s.blocks)]) for s in sections])
