"""Chat templates of a hostile checkpoint: small, and they ask for depth, time, memory or output."""


def repeated(start: str, times: int, step: str) -> str:
    """A template that begins with a value and computes a new one from it so many times."""
    loop = "{% for i in range(" + str(times) + ") %}{% set ns.s = " + step + " %}{% endfor %}"
    return "{% set ns = namespace(s=" + start + ") %}" + loop + "{{ ns.s | length }}"


# All may be refused while they load, or end the request that renders them; none may end the process.
TEMPLATES = {
    "namespace nested 100,000 deep": repeated("[]", 100_000, "[ns.s]"),
    "tojson with an indent of 10^9": "{{ messages | tojson(indent=1000000000) }}",
    "a string times 10^8": "{{ 'a' * 100000000 }}",
    "a width of 10^9": "{{ '%1000000000d' | format(1) }}",
    "doubled 40 times": repeated("'aaaaaaaa'", 40, "ns.s ~ ns.s"),
    "4,833 signs": "{{ " + "-" * 4833 + "1 }}",
    "4,833 nots": "{{ " + "not " * 4833 + "1 }}",
    "1,758 elifs": "{% if 0 %}" + "{% elif 0 %}" * 1758 + "{% endif %}x",
    "2,000 parentheses": "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
    "2,000 lists": "{{ " + "[" * 2000 + "]" * 2000 + " }}",
    "2,000 nested blocks": "{% if 1 %}" * 2000 + "x" + "{% endif %}" * 2000,
    "2,000 filters": "{{ 'a'" + "|upper" * 2000 + " }}",
    "2,000 attributes": "{{ messages" + ".a" * 2000 + " }}",
    "an endless loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% set a = 1 %}{% endfor %}{% endfor %}x",
    "a macro that calls itself": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "a large range": "{{ range(1000000000) | list }}",
    "2 MB of text": "x" * 2_000_000,
    "padding to 10^9": "{{ 'a'.ljust(1000000000) }}{{ 'a' | center(1000000000) }}",
    "replace that grows": repeated("'a' * 1000", 9, "ns.s.replace('a', 'a' * 1000)"),
}
