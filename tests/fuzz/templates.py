"""Chat templates of loops, macros and growing texts, most of which never end or fill the memory."""

from __future__ import annotations

from hypothesis import strategies as st

NUMBERS = st.sampled_from([0, 1, 3, 99, 99_999, 10**7, 10**10])
VALUES = st.sampled_from(
    [
        "n.x",
        "messages",
        "bos_token",
        "'text'",
        "[1, 2]",
        "range(99999)",
        "3",
        "n.x * 9",
        "n.x ~ n.x",
        "[n.x, n.x]",
        "{'a': n.x}",
        "(n.x | string)[1:]",
    ]
)
EXPRESSIONS = st.one_of(
    VALUES,
    st.tuples(VALUES, st.sampled_from(["+", "*", "**", "%", "~"]), VALUES).map(" ".join),
    st.tuples(VALUES, NUMBERS).map(lambda both: f"{both[0]} * {both[1]}"),
    st.tuples(
        VALUES,
        st.sampled_from(
            [
                "list",
                "join",
                "join(n.x)",
                "upper",
                "string",
                "length",
                "tojson",
                "replace('t', n.x)",
            ]
        ),
    ).map(" | ".join),
    st.tuples(VALUES, st.sampled_from(["center", "indent", "batch", "wordwrap"]), NUMBERS).map(
        lambda all_three: "{} | {}({})".format(*all_three)
    ),
    st.tuples(st.sampled_from(["n.x.center", "n.x.zfill", "'{:9999999999}'.format"]), NUMBERS).map(
        lambda both: f"{both[0]}({both[1]})"
    ),
)
LEAVES = st.one_of(
    st.sampled_from(["plain text", "\n", "{{ f() }}"]),
    EXPRESSIONS.map(lambda one: f"{{{{ {one} }}}}"),
    EXPRESSIONS.map(lambda one: f"{{% set n.x = {one} %}}"),
)
AROUND = [
    "{% for a in range(99999) %}BODY{% endfor %}",
    "{% for a in messages recursive %}BODY{{ loop(range(99999)) }}{% endfor %}",
    "{% set x %}BODY{% endset %}{% set n.x = x %}",
    "{% macro f() %}BODY{% endmacro %}",
    "{% call f() %}BODY{% endcall %}",
    "{% filter upper %}BODY{% endfilter %}",
    "{% if n.x %}BODY{% endif %}",
]
BODIES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=4).map("".join),
        st.tuples(st.sampled_from(AROUND), inner).map(
            lambda both: both[0].replace("BODY", both[1])
        ),
    ),
    max_leaves=12,
)


def templates() -> st.SearchStrategy[bytes]:
    """Templates of a few lines, with a text `n.x` that may grow and a macro `f`."""
    head = "{% set n = namespace(x='text') %}{% macro f() %}{{ n.x }}{% endmacro %}"
    return BODIES.map(lambda body: (head + body).encode())
