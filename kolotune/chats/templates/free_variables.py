"""Find the variables that a template reads before it has set them: what a server hands to it decides what it writes.

Example: ``{% if enable_thinking %}{% set mode = 1 %}{% else %}{% set mode = 2 %}{% endif %}{{ mode }}`` reads
``enable_thinking``; ``mode`` always has a value of the template's own.

Jinja2's `meta.find_undeclared_variables` names more: it does not see that each branch of an ``if`` sets a name.
"""

from __future__ import annotations

from collections.abc import Iterable

from jinja2 import nodes

_FAILS = "raise_exception"
_OF_MACROS = ("caller", "varargs", "kwargs")


def free_variables(tree: nodes.Template) -> set[str]:
    """Return the names that may be read before the template has set them, functions included."""
    finder = _Finder()
    # Macros of the top level call each other in any order, but none is called before all are defined.
    finder.visit_all(tree.body, {node.name for node in tree.body if isinstance(node, nodes.Macro)})
    return finder.found


def inspects(tree: nodes.Template, name: str) -> bool:
    """Whether the template may distinguish an absent value of this variable from none, or none from an empty list.

    Asking whether it is true, looping over it and writing it as JSON do not count.
    """
    return any(_inspects(node, name) for node in tree.find_all(nodes.Node))


def _inspects(node: nodes.Node, name: str) -> bool:
    if isinstance(node, nodes.And | nodes.Or | nodes.Not | nodes.If | nodes.CondExpr | nodes.For | nodes.Getitem):
        # The operands of `and` and `or` are their values, but who uses a value looks at its truth in most templates.
        return isinstance(node, nodes.CondExpr) and any(_is(value, name) for value in (node.expr1, node.expr2))
    if isinstance(node, nodes.Filter) and node.name == "tojson":
        return False
    return any(_is(child, name) for child in node.iter_child_nodes())


def _is(node: nodes.Node | None, name: str) -> bool:
    """Whether the node reads the variable, or is an expression that can have its value."""
    if isinstance(node, nodes.And | nodes.Or):
        return _is(node.left, name) or _is(node.right, name)
    return isinstance(node, nodes.Name) and node.name == name and node.ctx == "load"


class _Finder:
    """Walks through a template in the order in which it runs; `known` are the names that have a value by then."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_all(self, body: Iterable[nodes.Node], known: set[str]) -> None:
        for node in body:
            self.visit(node, known)

    def visit(self, node: nodes.Node, known: set[str]) -> None:
        method = getattr(self, f"_visit_{type(node).__name__}", None)
        if method is not None:
            method(node, known)
        else:
            self.visit_all(node.iter_child_nodes(), known)

    def _visit_Name(self, node: nodes.Name, known: set[str]) -> None:
        if node.ctx != "load":
            known.add(node.name)
        elif node.name not in known:
            self.found.add(node.name)

    def _visit_NSRef(self, node: nodes.NSRef, known: set[str]) -> None:
        if node.name not in known:
            self.found.add(node.name)

    def _visit_Assign(self, node: nodes.Assign, known: set[str]) -> None:
        self.visit(node.node, known)
        self.visit(node.target, known)

    def _visit_AssignBlock(self, node: nodes.AssignBlock, known: set[str]) -> None:
        self.visit_all(node.body, set(known))
        if node.filter is not None:
            self.visit(node.filter, known)
        self.visit(node.target, known)

    def _visit_If(self, node: nodes.If, known: set[str]) -> None:
        self.visit(node.test, known)
        branches = [node.body]
        for branch in node.elif_:
            self.visit(branch.test, known)
            branches.append(branch.body)
        after = []
        for body in (*branches, node.else_):
            names = set(known)
            self.visit_all(body, names)
            if not any(map(_ends, body)):
                after.append(names)
        if after:
            known |= set.intersection(*after)

    def _visit_For(self, node: nodes.For, known: set[str]) -> None:
        self.visit(node.iter, known)
        inside = set(known)
        self.visit(node.target, inside)
        if node.test is not None:
            self.visit(node.test, set(inside))
        inside.add("loop")
        self.visit_all(node.body, inside)
        self.visit_all(node.else_, set(known))

    def _visit_Macro(self, node: nodes.Macro, known: set[str]) -> None:
        self._visit_function(node, known)
        known.add(node.name)

    def _visit_CallBlock(self, node: nodes.CallBlock, known: set[str]) -> None:
        self.visit(node.call, known)
        self._visit_function(node, known)

    def _visit_function(self, node: nodes.Macro | nodes.CallBlock, known: set[str]) -> None:
        self.visit_all(node.defaults, known)
        self.visit_all(node.body, {*known, *(argument.name for argument in node.args), *_OF_MACROS})

    def _visit_FilterBlock(self, node: nodes.FilterBlock, known: set[str]) -> None:
        self.visit_all(node.body, set(known))
        self.visit(node.filter, known)

    def _visit_With(self, node: nodes.With, known: set[str]) -> None:
        self.visit_all(node.values, known)
        inside = set(known)
        self.visit_all(node.targets, inside)
        self.visit_all(node.body, inside)


def _ends(node: nodes.Node) -> bool:
    """Whether what follows the node in its branch is not reached."""
    if not isinstance(node, nodes.Output):
        return isinstance(node, nodes.Break | nodes.Continue)
    return any(
        isinstance(value, nodes.Call) and isinstance(value.node, nodes.Name) and value.node.name == _FAILS
        for value in node.nodes
    )
