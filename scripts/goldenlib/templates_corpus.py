"""Snippets and small templates with the constructs of published chat templates, written for this test.

One snippet a line. The templates below them have lines of their own, because line ends are what they are about.
"""

SNIPPETS = r"""
{{ 1e-7 }} {{ 1e16 }} {{ 1e15 }} {{ 123456789.125 }} {{ 1.0 }} {{ -0.0 }} {{ 1e22 }} {{ 0.0001 }} {{ 0.00001 }} {{ 1.5e300 * 1e10 }} {{ 2.5e-5 }}
{{ [1e-7, 1.0, 'a', "it's", none, true, {'k': (1, 2), 'q"': 'a\nb'}] }}
{{ (1,) }} {{ () }} {{ {} }} {{ [] }} {{ (1, 'a') }}
{{ 7 // 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 % -3 }} {{ 7 / 2 }} {{ 6 / 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 7.5 // 2 }} {{ -7.5 % 2 }}
{{ 'ab' * 3 }} {{ 3 * 'ab' }} {{ [1] * 2 }} {{ [1] + [2] }} {{ (1,) + (2,) }} {{ 'a' + 'b' }}
{{ 1 < 2 < 3 }} {{ 1 < 2 > 3 }} {{ 1 == 1.0 }} {{ 1 == true }} {{ 'a' < 'b' }} {{ [1,2] < [1,3] }} {{ 3 in [1,2,3] }} {{ 'a' not in 'abc' }} {{ not 1 in [2] }}
{{ 'x' ~ 1e-7 ~ none ~ true ~ [1, 'a'] ~ 1.0 }}
{{ '%s is %d and %.2f %r %5s|%-5s|%05d %x %%' % ('a', 3, 2.5, 'q', 'r', 's', 42, 255) }}
{{ '%s' % 'one' }} {{ '%(a)s' % {'a': 1} }} {{ "%s"|format(3) }} {{ '%5.1f|%+d|%e|%g|%c|%o|%X' % (3.14159, 5, 12345.678, 0.0001, 'c', 8, 255) }}
{{ 'a,b,,c'.split(',') }} {{ ' a  b '.split() }} {{ 'a,b,c'.rsplit(',', 1) }} {{ 'a,b,c'.split(',', 1) }} {{ 'a b c'.rsplit(None, 1) }} {{ 'abc'.split('x') }} {{ 'a,b'.split(sep=',') }} {{ 'a b c d'.split(maxsplit=2) }}
{{ 'a\nb\r\nc\n'.splitlines() }} {{ 'a\nb\n'.splitlines(true) }} {{ 'a\x0bb\x1cc\u2028d'.splitlines() }}
{{ '  x '.strip() ~ '|' }} {{ 'xxaxx'.strip('x') }} {{ 'xxaxx'.lstrip('x') }} {{ 'xxaxx'.rstrip('x') }}
{{ 'prefix-x'.removeprefix('prefix-') }} {{ 'x.txt'.removesuffix('.txt') }} {{ 'abcabc'.index('c') }} {{ 'abcabc'.rindex('c') }} {{ 'abcabc'.find('c', 3) }} {{ 'abc'.rfind('z') }} {{ 'abcabc'.count('bc') }} {{ 'aaa'.count('') }}
{{ '42'.zfill(5) }} {{ '-42'.zfill(5) }} {{ 'a'.center(5, '*') }} {{ 'ab'.center(5, '*') }} {{ 'a'.ljust(3) ~ '|' }} {{ 'a'.rjust(3, '.') }}
{{ 'Hello World'.swapcase() }} {{ "they're bill's".title() }} {{ 'hELLO'.capitalize() }} {{ 'straße'.casefold() }} {{ 'straße'.upper() }} {{ 'ǆ'.title() }}
{{ 'é'.encode() }} {{ 'abc'.encode('utf-8') }} {{ 'abc'.encode('utf-8').decode() }}
{{ 'abc'.startswith('a') }} {{ 'abc'.startswith(('x', 'a')) }} {{ 'abc'.endswith('c') }} {{ 'abc'.endswith(('x', 'bc')) }} {{ 'abc'.startswith('b', 1) }} {{ 'abc'.endswith('b', 0, 2) }}
{{ 'aXbXc'.replace('X', '-') }} {{ 'aXbXc'.replace('X', '-', 1) }} {{ ', '.join(['a', 'b']) }} {{ 'abc'.partition('b') }} {{ 'abcb'.rpartition('b') }} {{ 'abc'.partition('x') }}
{{ '12'.isdigit() }} {{ '²'.isdigit() }} {{ '½'.isnumeric() }} {{ '12'.isdecimal() }} {{ 'ab'.isalpha() }} {{ 'ab1'.isalnum() }} {{ ' '.isspace() }} {{ ''.isspace() }} {{ 'Ab Cd'.istitle() }} {{ 'ab'.islower() }} {{ 'AB'.isupper() }} {{ 'a_1'.isidentifier() }} {{ 'é'.isascii() }} {{ 'a\n'.isprintable() }}
{{ '{} {}'.format('a', 1) }}
{{ '{0} {1} {0}'.format('a', 'b') }}
{{ '{x}'.format(x=1) }}
{{ '{:>5}|{:<5}|{:^5}|{:05d}|{:.2f}|{:,}|{!r}'.format('a', 'b', 'c', 42, 1.5, 1234567, 'q') }}
{{ 'a\tb'.expandtabs() }}| {{ 'a\tb'.expandtabs(4) }}| {{ 'abc'.translate({97: 'x'}) }}
{{ [1,2,3,2].index(2) }} {{ [1,2,2].count(2) }} {{ [1,2].copy() }} {{ {'a': 1}.copy() }} {{ (1,2,2).count(2) }} {{ (1,2).index(2) }}
{{ {'a': 1, 'b': 2}.items()|list }} {{ {'a': 1}.keys()|list }} {{ {'a': 1}.values()|list }} {{ {'a': 1}.get('a') }} {{ {'a': 1}.get('b') }} {{ {'a': 1}.get('b', 'z') }} {{ {'a': 1}.items() }} {{ {'a': 1}.keys() }} {{ {'a': 1}.values() }}
{{ [1,2].append(3) }}
{{ {'a': 1}.update({'b': 2}) }}
{{ [1,2,3].pop() }}
{{ [3,1].sort() }}
{% set l = [1] %}{% do l.append(2) %}{{ l }}
{{ 'abcdef'[1:4] }} {{ 'abcdef'[::-1] }} {{ 'abcdef'[-3:] }} {{ 'abcdef'[::2] }} {{ 'abcdef'[4:1:-1] }} {{ [1,2,3,4][-2:] }} {{ [1,2,3,4][::-1] }} {{ [1,2,3,4][10:] }} {{ (1,2,3)[1:] }} {{ 'abc'[-1] }} {{ [1,2][5] }}| {{ 'abc'[-7:2] }}
{{ 'a b c'|wordcount }} {{ 'a b&c/é'|urlencode }} {{ {'a': 1, 'b': 'x y'}|urlencode }} {{ 'some long text here for you'|truncate(10) }} {{ 'some long text here'|truncate(10, true) }} {{ 'some long text here'|truncate(11, false, '!', 0) }} {{ '<b>a</b> <!-- c --> &amp;  b'|striptags }}
{{ [1,2,3,4,5]|batch(2)|list }} {{ [1,2,3]|batch(2, 'x')|list }} {{ [1,2,3,4,5]|slice(2)|list }} {{ [1,2,3,4,5]|slice(2, 'x')|list }}
{% for g in [{'a': 1, 'b': 'x'}, {'a': 2, 'b': 'y'}, {'a': 1, 'b': 'z'}]|groupby('a') %}{{ g.grouper }}:{{ g.list|map(attribute='b')|join(',') }};{% endfor %}
{{ [1,2,3,4]|select('even')|list }} {{ [1,2,3,4]|reject('even')|list }} {{ [0,1,'']|select|list }} {{ [{'a': 1}, {'a': 0}]|selectattr('a')|list }} {{ [{'a': 1}, {'a': 2}]|selectattr('a', 'equalto', 2)|list }} {{ [{'a': 1}, {'a': 2}]|rejectattr('a', '==', 2)|map(attribute='a')|list }}
{{ ['a', 'b']|map('upper')|list }} {{ [{'x': {'y': 1}}]|map(attribute='x.y')|list }} {{ [{'x': 1}, {}]|map(attribute='x', default='d')|list }} {{ [[1,2],[3]]|map('length')|list }} {{ ['a-b']|map('replace', '-', '+')|list }}
{{ {'b': 1, 'A': 2}|dictsort }} {{ {'b': 1, 'a': 2}|dictsort(false, 'value') }} {{ {'b': 1, 'a': 2}|dictsort(reverse=true) }}
{{ 1000|filesizeformat }} {{ 1|filesizeformat }} {{ 1500000|filesizeformat }} {{ 1024|filesizeformat(true) }} {{ 123|filesizeformat }}
<p{{ {'class': 'a', 'id': none, 'n': 1, 'x': '<'}|xmlattr }}>
{{ 'a long line of words that wraps around'|wordwrap(10) }} {{ 'aaaaaaaaaaaaa b'|wordwrap(5) }} {{ 'aa bb'|wordwrap(3, wrapstring='|') }}
{{ 'a\nb\n\nc'|indent }}| {{ 'a\nb'|indent(2, true) }}| {{ 'a\n\nb'|indent(2, blank=true) }} {{ 'a\nb'|indent('>>') }}
{{ 'ab'|center(6) }}| {{ '<a href="x">\'&'|escape }} {{ '<'|e }} {{ '<'|forceescape }} {{ [1, {'a': 'b'}]|pprint }} {{ 'x'|pprint }}
{{ 2.5|round }} {{ 3.5|round }} {{ 2.567|round(2) }} {{ 2.1|round(0, 'ceil') }} {{ 2.567|round(2, 'floor') }} {{ 42|round }} {{ 1234.5|round(-2) }}
{{ [1,2,3]|sum }} {{ [{'a': 1}, {'a': 2}]|sum(attribute='a') }} {{ [0.1, 0.2]|sum(start=1) }} {{ [1,2,1,3]|unique|list }} {{ ['a', 'A']|unique|list }} {{ ['a', 'A']|unique(true)|list }} {{ [3,1,2]|min }} {{ ['b', 'A']|max }} {{ [{'a': 2}, {'a': 1}]|min(attribute='a') }} {{ []|min }}|
{{ [1,2]|first }} {{ []|first }}| {{ [1,2]|last }} {{ 'abc'|first }} {{ 'abc'|last }} {{ 'abc'|list }} {{ (1,2)|list }} {{ {'a': 1}|list }}
{{ 1|string ~ 'x' }} {{ '12'|int }} {{ 'x'|int }} {{ 'x'|int(7) }} {{ '0x1f'|int(base=16) }} {{ '12.7'|int }} {{ 3.9|int }} {{ '1.5'|float }} {{ 'x'|float }} {{ 'x'|float(2.5) }} {{ '1e3'|float }} {{ '0b11'|int(0, 2) }} {{ '1_000'|int }} {{ none|int(5) }}
{{ 'abc'|upper }} {{ 'ABC'|lower }} {{ 'abc def'|title }} {{ "it's a-b"|title }} {{ 'aBC'|capitalize }} {{ ' a '|trim }}| {{ 'xxa'|trim('x') }} {{ 'abc'|length }} {{ [1]|count }} {{ 'abc'|reverse }} {{ [1,2]|reverse|list }} {{ 'aXa'|replace('a', 'b') }} {{ 'aaa'|replace('a', 'b', 2) }}
{{ [3,1,2]|sort }} {{ ['b', 'A', 'c']|sort }} {{ ['b', 'A', 'c']|sort(case_sensitive=true) }} {{ [3,1]|sort(reverse=true) }} {{ [{'a': 2}, {'a': 1}]|sort(attribute='a') }} {{ [{'a': 1, 'b': 2}, {'a': 1, 'b': 1}]|sort(attribute='a,b') }}
{{ [1,2]|join }} {{ [1,2]|join('-') }} {{ [{'a': 1}, {'a': 2}]|join(',', attribute='a') }} {{ ['a', 1.0, none]|join('|') }}
{{ x|default('d') }} {{ none|default('d') }} {{ ''|default('d', true) }} {{ x|d('e') }} {{ false|default('q', boolean=true) }}
{{ -5|abs }}
{{ (-5)|abs }}
{{ {'a': 1}|items|list }}
{{ 'a'|attr('nope') }}|
{{ {'a': 1, 'b': [1, 2.5, none, true, "é<>&'"]}|tojson }} {{ {'b': 1, 'a': 2}|tojson(sort_keys=true) }} {{ {'a': [1, 2]}|tojson(indent=2) }} {{ 'é'|tojson(ensure_ascii=true) }} {{ 'é😀'|tojson(ensure_ascii=True) }} {{ {'a': 1}|tojson(separators=(',', ':')) }} {{ [1, 2]|tojson(indent=0) }} {{ []|tojson(indent=2) }} {{ {'a': {}}|tojson(indent=2) }} {{ {1: 2, none: 3, true: 4, 1.5: 6}|tojson }} {{ 1e-7|tojson }} {{ 1e16|tojson }} {{ "\x7f\x01\"\\/"|tojson }} {{ (1, 2)|tojson }} {{ [1, [2]]|tojson(indent='\t') }}
{{ [1]|tojson(ensure_ascii=False, indent=1, separators=(',', ' : '), sort_keys=True) }} {{ {'b': {'z': 1, 'y': 2}}|tojson(false, 2, none, true) }}
{{ range is callable }} {{ 1 is callable }} {{ 1 is sameas 1 }} {{ none is sameas none }} {{ 'upper' is filter }} {{ 'nope' is filter }} {{ 'even' is test }} {{ [] is iterable }} {{ 1 is iterable }} {{ {} is mapping }} {{ 'a' is sequence }} {{ {} is sequence }} {{ range(3) is sequence }} {{ 1.5 is number }} {{ true is number }} {{ true is integer }} {{ 1 is integer }} {{ 1.0 is float }} {{ true is boolean }} {{ 1 is in [1] }} {{ 'a' is string }} {{ 1 is eq 1 }} {{ 1 is ne 2 }} {{ 1 is lt 2 }} {{ 2 is gt 1 }} {{ 2 is ge 2 }} {{ 2 is le 1 }} {{ 'A' is upper }} {{ 'a' is lower }} {{ 4 is divisibleby 2 }} {{ 3 is odd }} {{ 2 is even }} {{ x is defined }} {{ x is undefined }} {{ none is none }} {{ true is true }} {{ 1 is true }} {{ false is false }} {{ 'a' is escaped }} {{ 1 is not none }} {{ 1 is equalto 1 }} {{ 1 is lessthan 2 }} {{ 1 is greaterthan 2 }} {{ 1 is == 1 }}
{{ range(3)|list }} {{ range(1, 10, 3)|list }} {{ range(5, 0, -2)|list }} {{ range(3) }} {{ range(3)|length }} {{ range(10)[2] }} {{ range(10)[2:5]|list }}
{{ dict(a=1, b=2) }} {{ dict([('a', 1)]) }} {{ dict({'a': 1}, b=2) }}
{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set _ = c.reset() %}{{ c.next() }}
{% set j = joiner(', ') %}{% for i in [1,2,3] %}{{ j() }}{{ i }}{% endfor %}
{% set ns = namespace(a=1) %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }} {% set ns = namespace({'x': 1}, y=2) %}{{ ns.x }}{{ ns.y }}{{ ns.z }}
{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}
{% for i in [1,2,3] %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.depth }}{{ loop.depth0 }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('x', 'y') }}{{ loop.changed(i) }} {% endfor %}
{% for i in [] %}x{% else %}empty{% endfor %} {% for i in [1] if i > 1 %}x{% else %}none{% endfor %} {% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% endfor %} {% for k in {'a': 1, 'b': 2} %}{{ k }}{% endfor %} {% for (a, b), c in [((1, 2), 3)] %}{{ a }}{{ b }}{{ c }}{% endfor %}
{% for i in [[1, [2]], [3]] recursive %}{% if i is sequence %}[{{ loop(i) }}]{% else %}{{ i }}{% endif %}{% endfor %}
{% macro w(t) %}<{{ t }}>{{ caller() }}</{{ t }}>{% endmacro %}{% call w('b') %}body{% endcall %} {% macro w2() %}{{ caller('q') }}{% endmacro %}{% call(x) w2() %}[{{ x }}]{% endcall %}
{% filter upper %}abc {{ 'd' }}{% endfilter %} {% set t %}x{{ 1 }}y{% endset %}{{ t }} {% set t | upper %}abc{% endset %}{{ t }} {% set a, b = 1, 2 %}{{ a }}{{ b }} {% set a = b = 3 %}
{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{{ x }}{% endfor %}{{ x }} {% if true %}{% set x = 5 %}{% endif %}{{ x }} {% with y = 3, z = 4 %}{{ y }}{{ z }}{% set x = 9 %}{% endwith %}{{ x }}{{ y }}
{{ 'a' if true else 'b' }} {{ 'a' if false }}| {{ ('a' if false) is undefined }} {{ 1 or 2 }} {{ 0 or 'x' }} {{ '' and 1 }}| {{ 1 and 2 }} {{ not '' }}
{{ "a" "b" }} {{ 'it\'s' }} {{ "\u00e9\x41\n\t\\" }} {{ '\d' }} {{ 1_000 }} {{ 0x1F }} {{ 0b11 }} {{ 0o17 }} {{ 1.5e3 }} {{ True }} {{ None }} {{ False }}
{{ x }} {{ x.y is defined }}
{{ x.y.z }}
{{ x + 1 }}
{{ none.foo }}| {{ 'abc'.nope }}| {{ {'a': 1}.b }}| {{ {'a': 1}['b'] }}| {{ 1 .foo }}|
{{ {'items': 5}.items() | list }} {{ {'items': 5}['items'] }} {{ {'items': 5}.keys() | list }}
{{ 'abc'.nope() }}
{{ undefinedfn() }}
{{ 1 + 'a' }}
{{ 'a' + 1 }}
{{ none + 'a' }}
{{ 1 / 0 }}
{{ [1,2]|join(x) }}
{% for a in x %}{{ a }}{% endfor %}| {{ x|length }} {{ x|list }} {% if x %}t{% else %}f{% endif %} {{ x == x }} {{ x == none }} {{ x ~ 'a' }} {{ x|upper }}|
{{ 123456789012345678901234567890 }}
{{ 2 ** 100 }}
{{ 99999999999 * 99999999999999 }}
{{ 170141183460469231731687303715884105727 + 1 }}
{{ '%s' % none }} {{ '%s' % [1] }} {{ '%s %s' % (1, x) }}
{{ 'a%sb' | format('X') }} {{ '%(x)s'|format(x=2) }}
{{ loop is defined }}
{{ varargs is defined }}
{{ [1,2,3] | map('string') | join('+') }} {{ [1, 2] | map('float') | list }}
{{ {'a': {'b': [10, 20]}}.a.b[1] }} {{ {'a': {'b': [10, 20]}}.a.b.1 }} {{ [[1]][0][0] }}
{{ (1 if true else 2) + 3 }}
{{ -2 ** 2 }}
{{ 2 ** 3 ** 2 }}
{{ 1 + 2 * 3 - 4 / 2 }}
{{ 5 - 3 - 1 }}
{{ - 3 }}
{{ not true == false }}
{{ 1 - -1 }}
{{ 'a' ~ 1 + 2 }}
{{ 10 % 3 * 2 }}
{{ -1|abs }} {{ 'a'|upper ~ 'b'|upper }} {{ 'abc'|replace('a', 'x')|upper|length + 1 }} {{ 5 is odd and 4 is even }} {{ 'x' is in 'xyz' }} {{ 3 is not even }} {{ 'a'.upper().lower() }}
{{ true + 1 }} {{ true ~ '' }} {{ [true, false, none] }} {{ {true: 1, none: 2, 1.5: 3} }} {{ {1: 'a', true: 'b'} }} {{ 'a' == "a" }} {{ (1, 2) == [1, 2] }} {{ {'a': 1} == {'a': 1.0} }}
{{ 'ü\x00\x7f\u200b\xa0😀' | list }} {{ ['\\', '\'', '"', '\'"', '\t\r\n', '\x1b', '\u2028'] }}
{{ (1.0).is_integer() }}
{{ (255).bit_length() }}
{{ messages[0]['role'] }} {{ messages[0].role }} {{ messages | length }} {{ messages[-1]['content'] | trim }} {{ messages[0] }} {{ messages|map(attribute='role')|list }} {{ messages[1:] | length }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }}
{{ messages|selectattr('role', 'in', ['user', 'assistant'])|map(attribute='content')|join('|') }} {{ messages|tojson }} {{ messages|tojson(indent=4) }} {{ (messages|last).content }} {{ messages[0].get('tool_calls') is none }} {{ 'tool_calls' in messages[0] }} {{ messages[0].tool_calls is defined }}
{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }} {{ tools is defined }} {{ foo is defined }}
{{ 'é' | urlencode }} {{ 'a/b?c=d&e' | urlencode }} {{ [('a', 1), ('b', 2)] | urlencode }}
{{ 'x' | safe }}
{{ ('<' | safe) ~ '<' }}
{{ ('<b>' | escape) ~ '<' }}
{{ '<' | escape | length }}
{% if 1 %}a{% elif 2 %}b{% else %}c{% endif %}{% if 0 %}a{% elif 2 %}b{% else %}c{% endif %}{% if not 1 %}a{% elif 0 %}b{% else %}c{% endif %}
{{ 1.1 + 2.2 }} {{ 0.1 * 3 }} {{ 1e308 * 10 }} {{ -1e308 * 10 }} {{ 1e308 * 10 - 1e308 * 10 }} {{ 3 * 1.0 }} {{ 100000000000000000000.0 }} {{ 5e-324 }} {{ 1/3 }}
{{ 'abc' is string and 'abc' is sequence }} {{ 1 is string }} {{ {}.x is undefined }} {{ [] is not mapping }} {{ caller is defined }}
{% set m = {'a': [1, 2]} %}{{ m.a }}{{ m['a'][0] }}{{ m.get('a')[1] }}{% set m = dict(m, b=3) %}{{ m }}
{{ [1, 2, 3][1] }} {{ 'abc'[1] }} {{ [1,2,3][-1] }} {{ {'a': 1}['a'] }} {{ 'abc'[5] }}| {{ (1, 2)[0] }} {{ {1: 2}[1] }} {{ {'1': 2}[1] }}|
{{ "{:<10}|{:>10}|{:^10}|{:*^9}|{:+d}|{:x}|{:#x}|{:b}|{:e}|{:%}|{:8.3f}|{:_}".format('l', 'r', 'c', 'm', 5, 255, 255, 5, 1234.5, 0.25, 3.14159, 1000000) }}
{{ '%-10s|%10s|%.3s|%3d%%' | format('ab', 'cd', 'abcdef', 7) }}
{{ messages | map('tojson') | join }} {{ messages | groupby('role') | map('first') | list }}
{{ [3, 1, 2] | sort | first }} {{ [[1, 'b'], [1, 'a']] | sort }} {{ 'cab' | sort }} {{ 'cab' | sort | join }} {{ 'abc' | batch(2) | list }}
{{ [1, 2] | sum / 2 }} {{ ([1, 2] | length) / 2 }} {{ 7 | float // 2 }}
{{ '\n' | tojson }} {{ "tab\t" | tojson }} {{ '</script>' | tojson }} {{ none | tojson }} {{ true | tojson }} {{ 12345678901234567890123 | tojson }}
{% set s = 'x' %}{% set s = s + 'y' %}{{ s }}{% set s %}{{ s }}z{% endset %}{{ s }} {{ s.__class__ }}
{{ ''.join(['a', 'b']) }} {{ ','.join('abc') }} {{ ' '.join(x for x in []) }}
{{ ','.join([1]) }}
{{ [].index(1) }}
{{ 'abc'.index('z') }}
{{ '3' * '4' }}
{% for x in 5 %}{% endfor %}
{{ {}|dictsort|list }} {{ [] | sum }} {{ [] | max }}| {{ '' | first }}| {{ {} | length }}
{% include 'x' %}
{% extends 'x' %}
{% import 'x' as y %}
{% block b %}in block{% endblock %}
{% macro outer() %}{% macro inner(x) %}({{ x }}){% endmacro %}{{ inner(1) }}{% endmacro %}{{ outer() }}
{% set y = 1 %}{% macro sees() %}{{ y }}{% endmacro %}{% set y = 2 %}{{ sees() }} {% for y in [7] %}{{ sees() }}{% endfor %}
{% for a in [1,2] %}{% for b in [3,4] %}{{ loop.index }}{{ loop.last }}{% endfor %}{{ loop.index }} {% endfor %}
{% set outer_loop = namespace(x=none) %}{% for a in [1,2] %}{% set outer = loop %}{% for b in [3] %}{{ outer.index }}{{ loop.index }} {% endfor %}{% endfor %}
{{ {'a': 1}|xmlattr(false) }} {{ 'a'|center(3) }}| {{ 'a b'|wordwrap(1) }}
{{ "a" is in ("a", "b") }} {{ 2 in range(3) }} {{ 'k' in {'k': 1} }} {{ 1 in (1, 2) and 2 not in (1,) }}
{{ raise_exception('bad ' ~ 'role') }}
{{ '2' | int + 3 }} {{ '%.3f' | format(2) }} {{ 3.0 | int }} {{ 3.7 | round | int }} {{ 1e3 | int }} {{ '  5 ' | int }} {{ ' 1.5 ' | float }} {{ 'inf' | float }} {{ 'nan' | float }}
{{ [1,2,3]|first + [4]|last }} {{ [1, [2, 3]]|string }} {{ {'a': 'b'}|string }} {{ ('a' ~ {'b': 1})|length }}
{{ [1,2,3]|batch(linecount=2, fill_with='x')|list }}
{{ [1,2,3]|slice(slices=2)|list }}
{{ 2.55|round(precision=1, method='ceil') }}
{{ [1,3,2]|sort(true) }}
{{ ['b','A']|sort(false, true) }}
{{ [{'a': 2}, {'a': 1}]|sort(false, false, 'a') }}
{{ [{'a': 1}]|sum('a') }} {{ [{'a': 1}]|sum('a', 10) }} {{ [1]|sum(start=5) }}
{{ [{'a': 1}, {'a': 3}]|max(attribute='a') }} {{ ['a', 'B']|max(true) }} {{ ['a', 'B']|min }}
{{ [{'a': 1}, {}]|groupby('a', default=0)|list|length }} {{ [{'a': 1}, {}]|groupby('a', 0)|list|length }} {{ [{'a': 1}]|groupby(attribute='a')|list|length }}
{{ [{'a': 'x'}, {'a': 'X'}]|groupby('a')|list|length }} {{ [{'a': 'x'}, {'a': 'X'}]|groupby('a', case_sensitive=true)|list|length }}
{{ ['1', 'x']|map('int', 7)|list }} {{ ['1', 'x']|map('int', default=7)|list }} {{ ['a b']|map('split')|list }}
{{ [{'a': 1}]|map(attribute='b', default='z')|list }} {{ ['ab']|map('first')|list }}
{{ [1,2]|join(d='-') }} {{ 'abc'|join('-') }} {{ {'a':1,'b':2}|join('-') }}
{{ 'x'|replace('x', 'y', count=1) }} {{ 5|replace('5', '6') }}
{{ 'abc'|truncate(length=3, end='') }} {{ 'hello world foo'|truncate(8, end='..', leeway=0) }} {{ 'hello world'|truncate(8, leeway=0) }}
{{ 'a b'|wordwrap(width=1) }} {{ 'one two three four'|wordwrap(9, false) }} {{ 'well-known thing'|wordwrap(7) }} {{ 'x\ny'|wordwrap(5) }} {{ 'aaaa   bbbb'|wordwrap(5) }}
{{ 'abc'|center(width=7) }}| {{ 'x'|indent(width=2, first=True) }} {{ 'a\n'|indent }}| {{ ''|indent(first=true) }}| {{ 'a\n\nb\n'|indent(2, true, true) }}|
{{ 3|string }} {{ 1.5|int }} {{ '-7'|int }} {{ '7 '|int }} {{ true|int }} {{ []|int }} {{ [1]|float }} {{ '0x1F'|int(16) }} {{ 'zz'|int(0, 36) }} {{ '1e2'|int }} {{ ''|int(3) }}
{{ 5|filesizeformat }} {{ 999|filesizeformat }} {{ 1000000|filesizeformat }} {{ '2048'|filesizeformat(true) }} {{ 1e15|filesizeformat }}
{{ 'Ab cd'|capitalize }} {{ 'ab-cd (ef) [gh] {ij} <kl>'|title }} {{ "o'neil"|title }} {{ 'é'|upper }}
{{ 1|abs }} {{ -1.5|abs }} {{ '-'|length }} {{ none|length }}
{{ [1,2,3,4,5,6,7]|slice(3)|list }} {{ [1,2,3,4,5,6,7]|slice(3, 'x')|list }}
{{ [[3,'c'],[1,'a']]|sort }} {{ [(2,'b'),(1,'z')]|sort(attribute=1) }} {{ [{'n': {'m': 2}}, {'n': {'m': 1}}]|sort(attribute='n.m') }}
{{ [1, 2, 3]|select('gt', 1)|list }} {{ [1, 2, 3]|select('>', 1)|list }} {{ [1,none]|reject('none')|list }} {{ ['a','b']|select('in', ['a'])|list }} {{ [1,'a']|select('string')|list }}
{{ [{'a': {'b': 1}}, {'a': {}}]|selectattr('a.b')|list }} {{ [{'a': 1}, {}]|selectattr('a', 'defined')|list }} {{ [{'a': 1}]|selectattr('a', 'ne', 1)|list }}
{{ {'b': 1, 'a': 2}|sort }} {{ {'b': 1}|first }} {{ {'b': 1, 'a': 2}|last }} {{ {'a': 1}.items()|first }} {{ {'a': 1}.items()|length }} {{ {'a': 1}|items|first }}
{{ {'a': 1, 'b': 2}.keys()|join(',') }} {{ 'a' in {'a': 1}.keys() }} {{ ('a', 1) in {'a': 1}.items() }} {{ {'a': 1}.values()|sum }} {{ {'a': 1}.items()|tojson }}
{{ range(3)|tojson }} {{ range(3)|join }} {{ range(0) }} {{ range(5)|last }} {{ range(5)|reverse|list }} {{ range(1, 5)[1:]|list }} {{ range(3)|sum }} {{ 5 in range(3) }} {{ range(2, 10, 3) }} {{ range(3) == range(3) }}
{% for i in range(3)|reverse %}{{ i }}{% endfor %} {% for i in range(2, -1, -1) %}{{ i }}{% endfor %} {% for m in messages|reverse %}{{ m.role[0] }}{% endfor %} {% for m in messages[::-1] %}{{ m.role[0] }}{% endfor %}
{{ dict.fromkeys(['a', 'b'], 0) }} {{ dict(**{'a': 1}) }} {{ dict(a=1).a }}
{{ '%d' % 3.7 }} {{ '%d%%' % 50 }} {{ '%5s|%-5s|%05.1f|%+.2e|% d' % ('a', 'b', 2.25, 12345.678, 4) }} {{ '%x %X %#x %o %#o' % (255, 255, 255, 8, 8) }} {{ '%s' % ((1, 2),) }} {{ '%.3s|%10.2s|' % ('abcdef', 'xyz') }} {{ '%*d' % (5, 42) }} {{ '%c%c' % (65, 'b') }} {{ '%r %a' % ('é', 'é') }} {{ '%i %u' % (1, 2) }} {{ '%-05d|' % 3 }} {{ '%g %g %g' % (1e10, 0.00001, 100000) }} {{ '%5d|%-5d|%05d' % (-3, -3, -3) }} {{ '%.2d' % 5 }}
{{ '%s %s' % ('a',) }}
{{ '%s' % ('a', 'b') }}
{{ '%d' % 'a' }}
{{ '%(a)s %(b)5d' % {'a': 'x', 'b': 3} }} {{ '%(a)s' % dict(a=1) }}
{{ '%s'|format('a') }} {{ '%s-%s'|format('a', 'b') }} {{ '%(x)d'|format(x=5) }} {{ '%.2f'|format(1e-7) }} {{ '%s'|format(1e-7) }} {{ '%s'|format([1e-7]) }}
{{ '{:,.2f}'.format(1234567.891) }} {{ '{:+}'.format(3) }} {{ '{:>8}'.format('ab') }} {{ '{:*<6}'.format('ab') }} {{ '{:^7}'.format('ab') }} {{ '{:08.3f}'.format(-3.14159) }} {{ '{:e}'.format(12345.678) }} {{ '{:g}'.format(0.00001234) }} {{ '{:.3}'.format('abcdef') }} {{ '{:.3}'.format(3.14159) }} {{ '{:x}'.format(255) }} {{ '{:#b}'.format(5) }} {{ '{:c}'.format(65) }} {{ '{:%}'.format(0.5) }} {{ '{!s:>5}'.format('a') }} {{ '{{}}'.format() }} {{ '{:{}}'.format('a', 5) }}| {{ '{a[0]} {b.c}'.format(a=[1], b={'c': 2}) }}
{{ '{a}'.format_map({'a': 1}) }} {{ '{:d}'.format(true) }} {{ '{}'.format(true) }} {{ '{}'.format(none) }} {{ '{:>6}'.format(true) }} {{ '{}'.format([1e-7]) }} {{ '{:5}|{:<5}|'.format(3, 3) }} {{ '{:5}|'.format('a') }} {{ '{:=+6}'.format(3) }} {{ '{:_}'.format(1234567) }} {{ '{:.0f} {:.0f} {:.0f}'.format(0.5, 1.5, 2.5) }}
{{ 'abc'.split('') }}
{{ '  a b  c '.split(' ') }} {{ ' a  b c '.split(none, 1) }} {{ ' a  b c '.rsplit(none, 1) }} {{ ''.split() }} {{ ''.split(',') }} {{ 'a,b,c'.split(',', 0) }} {{ 'a b'.split(maxsplit=0) }} {{ '  a b '.split(maxsplit=0) }} {{ 'aXXbXXc'.rsplit('XX', 1) }} {{ 'a,b,c,d'.rsplit(',', 2) }} {{ ' a b '.rsplit() }}
{{ 'abc'.find('') }} {{ 'abc'.find('c', -1) }} {{ 'abc'.find('a', 1) }} {{ 'abc'.find('b', 0, 1) }} {{ 'ébc'.find('b') }} {{ 'abcabc'.rfind('b', 0, 3) }} {{ 'aaaa'.count('aa') }} {{ 'abcabc'.count('b', 2) }} {{ 'abc'.count('', 1) }} {{ 'abc'.find('', 10) }} {{ 'abc'.startswith('', 10) }} {{ 'abc'.startswith(('b', 'c'), 1) }}
{{ 'a-b_c d'.title() }} {{ 'HELLO wORLD'.capitalize() }} {{ 'ß'.title() }} {{ 'ﬁx'.title() }} {{ 'ß'.swapcase() }} {{ 'ΑΣ'.lower() }} {{ 'İ'.lower() }} {{ 'ŉ'.upper() }} {{ 'x1y'.title() }} {{ 'ǆ'.capitalize() }} {{ 'ﬁ'.upper() }} {{ 'Straße'.casefold() }}
{{ 'abc'.center(2) }} {{ 'abc'.center(6, '-') }} {{ 'ab'.center(5, '-') }} {{ 'a'.center(4, '-') }} {{ 'abc'.zfill(2) }} {{ '+5'.zfill(4) }} {{ ''.zfill(3) }} {{ '--1'.zfill(5) }} {{ 'é'.ljust(3, '·') }} {{ 'é'.rjust(3) }}
{{ 'a\tb\tc'.expandtabs(4) }} {{ '\t'.expandtabs(0) }}| {{ 'ab\n\tc'.expandtabs(4) }}
{{ 'abc'.partition('') }}
{{ 'a.b.c'.partition('.')[2] }} {{ 'a.b.c'.rpartition('.')[0] }} {{ 'abc'.removeprefix('x') }} {{ 'aab'.removeprefix('a') }} {{ 'baa'.removesuffix('a') }}
{{ 'ⅷ'.isnumeric() }} {{ 'Ⅷ'.isalpha() }} {{ '٣'.isdigit() }} {{ '٣'.isdecimal() }} {{ '①'.isdigit() }} {{ '①'.isdecimal() }} {{ '一'.isnumeric() }} {{ '一'.isalpha() }} {{ 'ª'.isalpha() }} {{ 'ʰ'.isalpha() }} {{ 'Ⓐ'.isalpha() }} {{ 'é'.isalnum() }} {{ '½'.isalnum() }} {{ ''.isalpha() }} {{ ''.isprintable() }} {{ ''.isascii() }} {{ 'a b'.isprintable() }} {{ '\x1c'.isspace() }} {{ '\u200b'.isspace() }} {{ 'A1'.isupper() }} {{ '1'.isupper() }} {{ 'ǅ'.isupper() }} {{ 'ǅ'.istitle() }} {{ 'A Bc'.istitle() }} {{ 'AB'.istitle() }} {{ '_x'.isidentifier() }} {{ '1x'.isidentifier() }} {{ 'é'.isidentifier() }} {{ ''.isidentifier() }}
{{ [1,2,3].index(3, 1) }} {{ [3,1,3].index(3, 1) }} {{ (1,).index(1) }} {{ [1, true, 1.0].count(1) }} {{ ['a'].count('b') }} {{ [[1]].count([1]) }}
{{ [1].index(2) }}
{{ {'a': 1}.get('a', 2) }}
{{ {'a': none}.get('a', 2) }}
{{ {1: 2}.get(1) }}
{{ {'a': {}}.get('b', {}).get('c') }}
{{ 'é'.encode('latin-1') }} {{ 'é'.encode('ascii') }}
{{ 'é'.encode('utf-8')|length }} {{ 'ab'.encode().hex() }} {{ 'é'.encode().decode('utf-8') }} {{ "it's".encode() }} {{ 'a\x00"'.encode() }}
{{ 3.0 }} {{ 3.10 }} {{ 1e5 }} {{ 123456789012345678.0 }} {{ 0.1 + 0.2 }} {{ 1e-5 }} {{ 1.5e-10 }} {{ 12345678.9 }} {{ 9007199254740993 }} {{ 1e100 }} {{ -1e-7 }} {{ [-1e-7] }} {{ 'x' ~ -1e-7 }} {{ 1e-7 ~ 'x' }} {{ 1e-7|string }} {{ 1e16|int }} {{ 1e-7 * 10 }} {{ [1e16, 2.0]|join(',') }} {{ {'a': 1e-7} }} {{ {'a': 1e-7}|tojson }} {{ 1e-7 == 0.0000001 }}
{{ 10 // 3 }} {{ -10 // 3 }} {{ 10 // -3 }} {{ 10 % -3 }} {{ -10 % -3 }} {{ 10.0 // 3 }} {{ 10 % 3.5 }} {{ -7.5 // 2 }} {{ 7 // 2.0 }} {{ 2 ** 0.5 }} {{ 2 ** 3 }} {{ (-2) ** 3 }} {{ 0 ** 0 }} {{ 4 / 2 }} {{ 1 / 3 }} {{ true + true }} {{ 5 % 5 }} {{ 0 % 5 }} {{ -0.0 % 5 }} {{ true % 2 }}
{{ 5 % 0 }}
{{ 5 // 0 }}
{{ 'a' * 0 }}| {{ 'a' * -1 }}| {{ [0] * 3 }} {{ (1,) * 2 }} {{ 2 * [1] }} {{ 'ab' * true }}
{{ [1] + [2, 3] }} {{ [1] + (2,) }}
{{ {'a': 1} == {'a': 1} }} {{ [1, 2] == [1, 2] }} {{ 'a' != 'b' }} {{ 1 != 1.0 }} {{ none == none }} {{ none == false }} {{ '' == none }} {{ 'a' < 'B' }} {{ (1, 2) < (1, 3) }} {{ [] == () }} {{ true == 1 }} {{ '1' == 1 }}
{{ not none }} {{ not [] }} {{ not {} }} {{ not 0.0 }} {{ not ' ' }} {{ 0 or [] or 'x' }} {{ 1 and '' }}| {{ none or none }} {{ not (1 and 0) }} {{ (not 1) in [false] }}
{{ 1 if 0 else 2 if 0 else 3 }} {{ (1, 2, 3)[-1] }} {{ [1,2,3][::2] }} {{ [1,2,3][:-1] }} {{ 'héllo'[1:3] }} {{ 'abc'[2:1] }}| {{ [1,2,3][-2] }} {{ 'abc'[::-2] }} {{ [1,2,3,4,5][1:4:2] }} {{ 'abc'[1:][0] }} {{ messages[0]['content'][1:3] }} {{ messages[1:][0].role }} {{ messages[-1:][0].role }} {{ messages[:1]|length }}
{{ {'a': 1}['a'] }}
{{ {'a': {'b': [1, {'c': 'd'}]}}.a.b[1].c }}
{{ {'a-b': 1}['a-b'] }}
{{ loop }}
{{ messages.role }}| {{ messages.0.role }} {{ messages[0].content.strip() }} {{ messages[0]['content'].strip().split(' ')[0].upper() }} {{ messages[5] is defined }} {{ messages[5].role }}
{{ namespace(a=1).a }} {% set n = namespace() %}{% set n.x = [] %}{% set n.x = n.x + [1] %}{{ n.x }} {% set n.y = n.z is defined %}{{ n.y }}
{% set l = [] %}{% set l = l + ['a'] %}{{ l }} {% set d = {} %}{% set d = dict(d, **{'k': 1}) %}{{ d }}
{% macro m(x, y=2) %}{{ x }}-{{ y }}{% endmacro %}{{ m(1) }} {{ m(y=3, x=4) }} {{ m(1)|upper }} {{ [m(1), m(2)]|join(',') }} {% set z = m(9) %}{{ z }} {{ m('a', 'b')|length }}
{% macro m(x) %}{% if x > 0 %}{{ x }}{{ m(x - 1) }}{% endif %}{% endmacro %}{{ m(3) }}
{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}B{% endmacro %}{{ a() }}
{% set g = 'outer' %}{% macro m() %}{{ g }}{% set g = 'inner' %}{{ g }}{% endmacro %}{{ m() }}{{ g }}
{% for i in [1] %}{% macro m() %}{{ i }}{% endmacro %}{{ m() }}{% endfor %}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(z=2) }}
{% call m() %}x{% endcall %}
{% for m in messages %}{% if loop.first and m.role == 'system' %}S{% elif m.role == 'user' and loop.index is divisibleby 2 %}U{% else %}A{% endif %}{% if not loop.last %},{% endif %}{% endfor %}
{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }}{{ m.role }} {% endfor %} {% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else '-' }}>{{ loop.nextitem.role if loop.nextitem is defined else '-' }} {% endfor %}
{% for x in [1, 1, 2] %}{% if loop.changed(x) %}{{ x }}{% endif %}{% endfor %} {% for x in [1,2,3] %}{{ loop.cycle('a', 'b') }}{% endfor %} {% for x in 'abc' %}{{ x }}-{% endfor %} {% for k, v in {'a': 1}|dictsort %}{{ k }}{{ v }}{% endfor %} {% for k, v in {'b': 1, 'a': 2}|items %}{{ k }}{{ v }}{% endfor %}
{% set x %}a{% for i in [1,2] %}{{ i }}{% endfor %}{% endset %}{{ x|length }} {% set ns = namespace(s='') %}{% for i in [1,2] %}{% set ns.s = ns.s ~ i %}{% endfor %}{{ ns.s }} {% set a, (b, c) = 1, (2, 3) %}{{ a }}{{ b }}{{ c }} {% set t = 1, 2 %}{{ t }}
{% filter trim %}  x  {% endfilter %}{% filter replace('a', 'b') %}aaa{% endfilter %}{% filter upper|replace('X', 'y') %}x{% endfilter %} {% with %}{% set q = 1 %}{{ q }}{% endwith %}{{ q is defined }} {% with a=1 %}{{ a }}{% endwith %}
{% if messages and messages[0].role == 'system' %}{% set system_message = messages[0].content|trim %}{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}{{ system_message }}{{ loop_messages|length }}
{% if x is not defined %}{% set x = 5 %}{% endif %}{{ x }} {% set x = x if x is defined else 1 %}{{ x }} {{ (x is defined and x) or 'n' }} {% if tools %}t{% endif %} {% if not tools is defined %}u{% endif %} {% if tools is not none %}n{% endif %} {% if tools is defined and tools %}q{% endif %}
{% generation %}{% set inside = 1 %}{{ inside }}{% endgeneration %}{{ inside is defined }} {% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}
{{ raise_exception() }}
{{ raise_exception('a', 'b') }}
{{ 'é' ~ none ~ x }} {{ 'a' ~ (1, 2) }} {{ [] ~ {} }} {{ 1 ~ 2 }} {{ 1.0 ~ '' }} {{ 'a' ~ true }} {{ 1e-7 ~ 1e16 }}
{{ {'a': true, 'b': none}|tojson }} {{ 'a"b\\c\n'|tojson }} {{ [1.0, 1e-7, 1e16, 1.5]|tojson }} {{ {'b': 1, 'a': [{'d': 1, 'c': 2}]}|tojson(sort_keys=True, indent=2) }} {{ 'ü'|tojson(True) }} {{ {}|tojson(indent=4) }} {{ [[], {}]|tojson(indent=1) }} {{ x|default({})|tojson }} {{ 'a'|tojson|tojson }} {{ [1]|tojson(separators=[';', '=']) }} {{ {'a': 1}|tojson(separators=(';', '='), indent=1) }}
{{ x|tojson }}
{{ messages|tojson(indent=2)|indent(4) }} {{ messages[0].items()|list }} {{ messages[0]|list }} {{ messages[0].keys()|list|tojson }} {% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %} {{ messages[0]|length }} {{ messages[0]|dictsort }} {{ 'role' in messages[0] }} {{ messages|map(attribute='content')|map('length')|sum }}
{{ 'a' is in 'abc' }}
{{ 1 is in [1, 2] }}
{{ 'x' is not in ['y'] }}
{{ 3 is divisibleby(3) }}
{{ 1 is sameas true }}
{{ none is sameas(none) }}
{{ x is none }}
{{ x is not defined }}
{{ 'a' is eq('a') }}
{{ 1.0 is integer }}
{{ 1 is float }}
{{ none is number }}
{{ 'a' is iterable }}
{{ none is iterable }}
{{ {} is iterable }}
{{ raise_exception is defined }}
{{ strftime_now is callable }}
{{ 1 is mapping }}
{{ (1 > 0) is true }}
{{ [] is false }}
{{ 'ABC' is upper }}
{{ '' is lower }}
{{ 'tojson' is filter }}
{{ 'defined' is test }}
{{ 2 is even and 3 is odd }}
{{ not 3 is even }}
{{ [1,2,3]|length > 2 }} {{ 'a,b'|replace(',', ';')|upper }} {{ ('a' if true) ~ 'b' }} {{ ['x'] + ['y'] if true else [] }} {{ (messages|first)['role'] }} {{ messages|length - 1 }} {{ -messages|length }} {{ 2 * messages|length }} {{ 'x' * messages|length }}
{{ 'abc' 'def' }}
{{ 'a' 'b' ~ 'c' }}
{{ "\x41\u0042\103\'\"\\" }}
{{ '\a\b' | length }}
{{ 1_000 }}
{{ 1e3 }}
{{ 0xff }} {{ 0b101 }} {{ 0o17 }} {{ 1_0.5 }} {{ 1E5 }}
{{ {'a': 1,} }} {{ [1,] }} {{ (1,) }} {{ f(1,) if f is defined }} {{ {1: 'a', 'b': [2]} }} {{ {'a' ~ 'b': 1} }} {{ {} or 'e' }}
{{ foo.bar }}
{{ foo['bar'] }}
{{ foo() }}
{% if foo is defined %}{{ foo() }}{% endif %}ok
{{ (foo or 'x')|upper }} {{ foo|default('y') }} {{ foo.bar|default('z') }} {{ foo|d }}| {{ foo is defined and foo.bar }} {{ [foo]|length }} {{ foo == '' }} {{ foo in ['a'] }} {{ 'a' in foo }}
{{ messages[0].foo.bar }}
{{ messages[0].foo|default('none') }} {{ messages[0].foo or 'q' }} {{ messages[0].foo is none }} {{ messages[0].foo == none }} {{ messages[0]['foo'] }}| {{ messages[0].foo|length }}
"""

TEMPLATES = [
    'a\r\nb\r\n{% if true %}\r\n  c\r\n{% endif %}\r\nd\r\n',
    'a\rb\r{{ 1 }}\r',
    'x\n',
    'x\n\n',
    '\n',
    '{{ 1 }}\n',
    '{% if true %}\nx\n{% endif %}\n',
    '  {% if true %}\n    x\n  {% endif %}\n  y\n',
    'a {%- if true -%} b {%- endif -%} c\n',
    'a\n  {%+ if true %}\nb{% endif +%}\nc\n',
    '{# c #}\nx\n  {# d #}  \ny',
    '{%- raw -%}\n {{ x }} \n{%- endraw -%}\n z',
    '  {{ 1 }}\n  {% set x = 1 %}  \n  {{ x }}\n',
    '{% for m in messages %}\n  {{ m.role }}\n{% endfor %}\nend\n',
    "{{ 'a\r\nb'|length }}",
    '{{ "a\r\nb" }}',
    '{% generation %}x{% endgeneration %}',
    '{%- generation %}\nx\n{% endgeneration -%}\n y',
    '{% set x %}\n a\n{% endset %}{{ x }}|',
    '{% raw %}\r\na\r\n{% endraw %}',
    '{{ 1 }}\t{% if true %}\tx{% endif %}',
    'text {% if true %}\n  y {% endif %}\nz',
    "{{ '\\r\\n' | length }}",
    '# for x in y\n## comment\n',
    "{{ '{%' }}{{ '}}' }}",
    '{{ "{{" ~ \'}}\' }}',
    '{ { x } }{%if true%}y{%endif%}',
    'a\u2028b\x0bc\x0c\n',
    '{% macro a() -%}\n  x\n{%- endmacro %}\n{{ a() }}\n',
    '{% if true -%}\n\n\n x {%- else %} y {% endif %}\n\n',
    '\ufeffx\n',
    "{% set x = {\n 'a': 1,\n} %}\n{{ x }}\n",
    '{{ [1,\n2] }}',
    '{{ f(\n) if f is defined }}',
    '{%- for i in [1,2] %}{{ i }}\n{%- endfor %}',
    '\r\n{{ 1 }}\r\n\r\n',
    '{% raw %}\nx{% endraw %}\ny',
    '{% raw -%}\n  x\n{%- endraw %}\n|',
    "{{ '\\\n' | length }}",
    'a {% raw %} {{ x }} {% endraw %}\nb',
    '  {% raw %}\n  a\n  {% endraw %}\n  b\n',
    "{%- macro r(m) -%}\n  {{- m.role -}}\n{%- endmacro -%}\n{%- for m in messages -%}\n  {{- '<|' ~ r(m) ~ '|>\\n' -}}\n  {%- if m.content is string -%}\n    {{- m.content | trim -}}\n  {%- endif -%}\n  {{- '<|end|>' -}}\n{%- endfor -%}\n{%- if add_generation_prompt -%}\n  {{- '<|assistant|>' -}}\n{%- endif -%}\n",
    "{% for m in messages %}\n{% if m.role == 'system' %}\n[S]{{ m.content }}[/S]\n{% elif m.role == 'user' %}\n[U]{{ m.content }}[/U]\n{% else %}\n    {{ m.content }}{{ eos_token }}\n{% endif %}\n{% endfor %}\n",
    '{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = \'26 Jul 2024\' %}\n{%- endif %}\n{%- if not tools is defined %}\n    {%- set tools = none %}\n{%- endif %}\n{%- if messages[0][\'role\'] == \'system\' %}\n    {%- set system_message = messages[0][\'content\']|trim %}\n    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = \'\' %}\n{%- endif %}\n{{- \'<h>system</h>\\n\\n\' }}\n{%- if tools is not none %}\n    {{- \'tools\' }}\n{%- endif %}\n{{- \'Today: \' + date_string + \'\\n\\n\' }}\n{{- system_message }}\n{%- for message in messages %}\n    {%- if not (message.role == \'ipython\' or \'tool_calls\' in message) %}\n        {{- \'<h>\' + message[\'role\'] + \'</h>\\n\\n\' + message[\'content\'] | trim + \'<e>\' }}\n    {%- elif \'tool_calls\' in message %}\n        {%- for arg_name, arg_val in tool_call.arguments | items %}\n            {{- arg_name + \'="\' + arg_val + \'"\' }}\n        {%- endfor %}\n    {%- endif %}\n{%- endfor %}\n',
    "{%- set ns = namespace(found=false, last=-1) %}\n{%- for m in messages[::-1] %}\n{%- set index = (messages|length - 1) - loop.index0 %}\n{%- if not ns.found and m.role == 'user' and not(m.content.startswith('<t>') and m.content.endswith('</t>')) %}\n{%- set ns.found = true %}{%- set ns.last = index %}\n{%- endif %}\n{%- endfor %}\n{{ ns.last }}\n{%- for m in messages %}\n{%- if '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content.rstrip('\\n').split('x')|first }}{% endif %}\n{%- endfor %}",
    "{%- if messages[0]['role'] == 'system' -%}{%- set offset = 1 -%}{%- else -%}{%- set offset = 0 -%}{%- endif -%}{%- for message in messages -%}{%- if (message['role'] == 'user') != (loop.index0 % 2 == offset) -%}{{ raise_exception('alternate') }}{%- endif -%}{{ message.content.strip() }}{%- endfor -%}",
    "{% for message in messages %}{{ loop.index0 % 2 }}{{ (loop.index0 + 1) // 2 }}{{ '%02d' % loop.index }}{% endfor %}",
    "{% macro json_to_python_type(s) %}{% set basic = {'string': 'str', 'number': 'float'} %}{% if basic[s.type] is defined %}{{ basic[s.type] }}{% elif s.type == 'array' %}{{ 'list[' + json_to_python_type(s['items']) + ']' }}{% elif s.type == 'object' %}{{ 'dict' }}{% elif s.type is iterable %}{% for t in s.type %}{{ json_to_python_type({'type': t}) }}{% if not loop.last %}|{% endif %}{% endfor %}{% else %}Any{% endif %}{% endmacro %}{{ json_to_python_type({'type': 'array', 'items': {'type': 'number'}}) }} {{ json_to_python_type({'type': ['string', 'number']}) }}",
]
