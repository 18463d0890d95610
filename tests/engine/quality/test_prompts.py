"""Prompt files as they are published: read right, with the right line numbers, or refused by a sentence."""

import re

import pytest

from engine.errors import RequestError
from engine.quality import prompts

PARTI = "Prompt\tCategory\tChallenge\tNote\n"


@pytest.fixture
def read(tmp_path):
    """Write a file and read it; gives (id, category, text) of each prompt."""

    def run(name, content):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [(p.id, p.category, p.text) for p in prompts.read(str(file)).prompts]

    return run


READ = {
    "PartiPrompts: a line begins with a quotation mark": (
        "p.tsv",
        f'{PARTI}a red boat\tVehicles\tBasic\t\n"STOP" on a sign\tSigns\tText\t\na 12" disc\tArts\tText\t\n',
        [(2, "Vehicles", "a red boat"), (3, "Signs", '"STOP" on a sign'), (4, "Arts", 'a 12" disc')],
    ),
    "a TSV whose quotation marks would pair over lines": (
        "p.tsv",
        'prompt\tcategory\n"a cat\tA\na dog\tB\nthe 12"\tC\n',
        [(2, "A", '"a cat'), (3, "B", "a dog"), (4, "C", 'the 12"')],
    ),
    "a TSV with quoted fields": (
        "p.tsv",
        'prompt\tcategory\n"a ""red"" cat"\tA\n"a dog\nin a hat"\tB\na bird\tC\n',
        [(2, "A", 'a "red" cat'), (3, "B", "a dog\nin a hat"), (5, "C", "a bird")],
    ),
    "GenEval": (
        "p.jsonl",
        '{"tag": "one", "include": [{"class": "cup"}], "prompt": "a cup"}\n\n{"tag": "two", "prompt": "caf\\u00e9"}\n',
        [(1, "one", "a cup"), (3, "two", "café")],
    ),
    "JSON lines of strings": ("p.ndjson", '"a cat"\n"a\u2028dog"\n', [(1, "", "a cat"), (2, "", "a\u2028dog")]),
    "one JSON line": ("p.jsonl", '{"prompt": "a cat"}', [(1, "", "a cat")]),
    "a list named as lines": ("p.jsonl", '[\n {"prompt": "a cat"}\n]\n', [(1, "", "a cat")]),
    "lines named as a list": (
        "p.json",
        '{"prompt": "a cat"}\r\n{"prompt": "a dog"}\r\n',
        [(1, "", "a cat"), (2, "", "a dog")],
    ),
    "capitals in JSON": ("p.json", '[{"PROMPT": "a cat", "Category": "A"}]', [(1, "A", "a cat")]),
    "capitals in JSON lines": ("p.jsonl", '{"Prompt": "a cat", "Tag": "A"}', [(1, "A", "a cat")]),
    "category before tag": ("p.json", '[{"tag": "B", "prompt": "a cat", "category": "A"}]', [(1, "A", "a cat")]),
    "tag in a table": ("p.csv", "tag,prompt\nA,a cat\n", [(2, "A", "a cat")]),
    "semicolons": ("p.csv", 'prompt;category\n"a cat; red, round";A\n', [(2, "A", "a cat; red, round")]),
    "sep=": ("p.csv", "sep=;\r\nprompt;category\r\na cat, red;A\r\n", [(3, "A", "a cat, red")]),
    "sep= in capitals, of a tab": ("p.csv", '"SEP=\t"\nprompt\tcategory\na cat\tA\n', [(3, "A", "a cat")]),
    "sep= of a bar": ("p.csv", "sep=|\nprompt|category\na cat|A\n", [(3, "A", "a cat")]),
    "sep= in a text file": ("p.txt", "sep=;\nprompt\na cat\n", [(3, "", "a cat")]),
    "tabs in a CSV": ("p.csv", "Prompt\tCategory\na cat, red\tA\n", [(2, "A", "a cat, red")]),
    "commas in a TSV": ("p.tsv", 'prompt,category\n"a cat, red",A\n', [(2, "A", "a cat, red")]),
    "CRLF inside quotes": (
        "p.csv",
        'prompt,category\r\n"a cat\r\non a mat",A\r\n\r\na dog,B\r\n',
        [(2, "A", "a cat\non a mat"), (5, "B", "a dog")],
    ),
    "CR as on old Macs": ("p.csv", "prompt,category\ra cat,A\ra dog,B\r", [(2, "A", "a cat"), (3, "B", "a dog")]),
    "UTF-16 as Excel saves it": (
        "p.txt",
        "Prompt\tCategory\r\na café\tA\r\n".encode("utf-16"),
        [(2, "A", "a café")],
    ),
    "UTF-16 of the other end": ("p.csv", b"\xfe\xff" + "prompt\na cat\n".encode("utf-16-be"), [(2, "", "a cat")]),
    "UTF-8 with a mark": ("p.csv", "\ufeffPrompt;Category\na cat;A\n", [(2, "A", "a cat")]),
    "a text file with a heading": ("p.txt", "Prompt\na cat, red\n", [(2, "", "a cat, red")]),
    "a text file that is a table": ("p.txt", "category,prompt\nA,a cat\n", [(2, "A", "a cat")]),
    "text with a comma and the word": ("p.txt", "a cat, prompt\na dog\n", [(1, "", "a cat, prompt"), (2, "", "a dog")]),
    "text with braces that is no JSON": (
        "p.txt",
        "{red|blue} cat\n[a] dog\n",
        [(1, "", "{red|blue} cat"), (2, "", "[a] dog")],
    ),
    "text in quotation marks": ("p.txt", '"a cat"\n', [(1, "", '"a cat"')]),
    "a very long line": (
        "p.txt",
        "cat " * 50_000 + "\na dog\n",
        [(1, "", ("cat " * 50_000).strip()), (2, "", "a dog")],
    ),
    "fewer fields than the heading": ("p.tsv", f"{PARTI}a cat\tA\na dog\n", [(2, "A", "a cat"), (3, "", "a dog")]),
    "rows of nothing": ("p.csv", "prompt,category\n,\n\na cat,\n , \n", [(4, "", "a cat")]),
    "empty category": (
        "p.jsonl",
        '{"prompt": "a cat", "category": null}\n{"prompt": "a dog", "tag": ""}',
        [(1, "", "a cat"), (2, "", "a dog")],
    ),
    "no category": ("p.csv", "id,prompt\n7,a cat\n", [(2, "", "a cat")]),
}


@pytest.mark.parametrize("case", READ)
def test_a_published_file_is_read(read, case):
    name, content, found = READ[case]
    assert read(name, content) == found


REFUSED = {
    "more fields": ("p.csv", "prompt,category\na dog,B\na cat, sitting, red,A\n", ["Line 3", "4 fields", "heading 2"]),
    "more fields in one column": ("p.csv", "prompt\na cat, red\n", ["Line 2", "2 fields"]),
    "more fields after quoted lines": ("p.csv", 'prompt,category\n"a\nb",A\nc,d,e\n', ["Line 4"]),
    "more fields in an unquoted TSV": ("p.tsv", 'prompt\tcategory\n"a" cat\tA\na\tb\tc\n', ["Line 3", "3 fields"]),
    "more fields with semicolons": ("p.csv", "prompt;category\na;b;c\n", ["Line 2"]),
    "more fields after sep=": ("p.csv", "sep=;\nprompt;category\na;b;c\n", ["Line 3"]),
    "no prompt": ("p.csv", "category,prompt\nA,a cat\nB,\n", ["Line 3", "no prompt"]),
    "too few fields": ("p.csv", "category,prompt\nA\n", ["Line 2", "1 fields only"]),
    "two columns named prompt": ("p.csv", "prompt,Prompt\na,b\n", ["2 columns named prompt"]),
    "two columns named category": ("p.csv", "prompt,category,CATEGORY\na,b,c\n", ["2 columns named category"]),
    "quotes that do not end": ("p.csv", 'prompt,category\na,b\n"a cat,A\na dog,B\n', ["Line 3", "cannot be read"]),
    "quotes in a CSV that are the text's": ("p.csv", 'prompt,category\n"STOP" on a sign,A\n', ["Line 2"]),
    "no heading": ("p.csv", "a cat\na dog\n", ["no column named prompt", "line 1"]),
    "no heading after sep=": ("p.csv", "sep=;\na cat;b\n", ["no column named prompt", "line 2"]),
    "a heading of another separator than sep=": ("p.csv", "sep=;\nprompt,category\na,b\n", ["no column named prompt"]),
    "a bad JSON line": ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', ["Line 2", "not valid JSON"]),
    "a JSON line that is a number": ("p.jsonl", '{"prompt": "a"}\n\n3\n', ["Line 3", "not a prompt"]),
    "a deep JSON line": ("p.jsonl", '{"prompt": ' + "[" * 100_000 + "\n", ["Line 1", "not valid JSON"]),
    "a JSON line without a prompt": ("p.jsonl", '{"caption": "a"}\n', ["Line 1", "not a prompt"]),
    "an empty prompt in JSON": ("p.json", '["a", {"prompt": " "}]', ["Entry 2", "no prompt"]),
    "two fields of one name": ("p.json", '[{"prompt": "a", "Prompt": "b"}]', ["Entry 1", "2 fields named prompt"]),
    "the very same field twice": ("p.json", '[{"prompt": "a", "prompt": "b"}]', ["Entry 1", "2 fields named prompt"]),
    "a tag that is no text": ("p.jsonl", '{"prompt": "a", "tag": 3}\n', ["category of line 1"]),
    "half a character in a category": ("p.json", '[{"prompt": "a", "category": "\\ud800"}]', ["category of entry 1"]),
    "JSON lines in a text file": ("p.txt", 'a cat\n{"prompt": "a dog"}\n', ["Line 2", ".jsonl"]),
    "only JSON lines in a text file": ("p.txt", '{"prompt": "a"}\n{"prompt": "b"}\n', ["Line 1", ".jsonl"]),
    "a JSON list in a text file": ("p.txt", '[\n "a cat",\n "a dog"\n]\n', ["is JSON"]),
    "JSON without an ending of the name": ("prompts", '{"prompt": "a"}\n', ["is JSON"]),
    "NUL": ("p.txt", "a cat\na\0dog\n", ["line 2", "NUL"]),
    "UTF-16 without a mark": ("p.csv", "prompt\na cat\n".encode("utf-16-le"), ["NUL"]),
    "UTF-16 cut short": ("p.csv", "prompt\na cat\n".encode("utf-16")[:-1], ["not UTF-8 text"]),
    "UTF-32": ("p.csv", "prompt\na cat\n".encode("utf-32"), ["NUL"]),
    "Latin-1": ("p.csv", "prompt\na caf\xe9\n".encode("latin-1"), ["not UTF-8 text (byte 13)"]),
    "a field of a megabyte": ("p.csv", "prompt\n" + "x" * 1_000_000 + "\n", ["Line 2"]),
    "a heading alone": ("p.tsv", PARTI, ["has no prompts"]),
    "a heading alone in a text file": ("p.txt", "prompt\n", ["has no prompts"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_be_drawn_wrongly_is_refused_in_one_sentence(read, case):
    name, content, says = REFUSED[case]
    with pytest.raises(RequestError) as raised:
        read(name, content)
    said = str(raised.value)
    assert "\n" not in said and said.endswith(".")
    assert all(word in said for word in says), said


def test_a_place_is_said_by_line_or_by_entry(tmp_path):
    for name, content, place in (("p.jsonl", '\n{"prompt": "a"}', "Line 2"), ("p.json", '["a"]', "Entry 1")):
        (tmp_path / name).write_text(content)
        found = prompts.read(str(tmp_path / name))
        assert re.fullmatch(f"{place} of {re.escape(name)}", found.place(found.prompts[0]))
