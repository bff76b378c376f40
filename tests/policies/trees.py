"""Policy text as the Python values a JSON Schema judges, by the scalar rules of the language."""

from __future__ import annotations

from policies.tree import ListNode, MapNode, Node, Source, parse


def as_python(node: Node) -> object:
    if isinstance(node, MapNode):
        return {key.text: as_python(inner) for key, inner in node.entries}
    if isinstance(node, ListNode):
        return [as_python(item) for item in node.items]
    if node.kind == "nothing":
        return None
    if node.flag is not None:
        return node.flag
    if node.whole is not None:
        return node.whole
    return float(node.text) if node.kind == "a number" else node.text


def read_python(text: str) -> object:
    return as_python(parse(Source("p.yaml", text)))
