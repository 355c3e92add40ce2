"""Sentences that the tiny tokenizers are trained on, and strings that they are tried on."""

SENTENCES = """
A small boat crosses the quiet lake before the sun comes up.
The baker opens the oven and the whole street smells of warm bread.
She keeps three yellow notebooks on the shelf above the window.
Every morning the old clock in the tower rings seven times.
We walked along the river until the lights of the town were behind us.
The train to the coast leaves at half past nine, and it never waits.
He writes letters with a pencil because ink runs when it rains.
A red kite hangs in the wind over the empty field.
Two cats sleep on the roof of the blue car.
The lighthouse keeper counts the ships that pass in the night.
When winter ends, the children bring their bicycles out again.
I can't remember where I've put the keys, but they're here.
They'll be back soon; it isn't far, and we're not in a hurry.
A glass city under a violet sky, seen from a high bridge.
Portrait of an old sailor with a white beard, soft light, detailed.
A photograph of a mountain village in the snow at dusk.
Slow camera movement over a green valley with a winding road.
A golden retriever runs through shallow water, waves splashing.
An astronaut rides a horse on the moon, wide shot, film grain.
Close view of a drop of water falling on a leaf in spring.
The market sells apples, pears, plums, and bunches of fresh herbs.
Rain drums on the tin roof while the kettle begins to sing.
Our teacher draws a circle and asks how long its edge is.
The library closes at six, so please return the books by five.
Numbers such as 3, 14, 159 and 2653 fill the first page.
In 1998 the bridge was 240 meters long; now it is 365.
The answer is 42, the price is 7.50, and the code is 0x1F.
Please write a short story about a robot that learns to paint.
Tell me the name of the largest city in the country.
What is the difference between a model and a program?
You are a helpful assistant who answers in one or two sentences.
The quick answer is yes, but the long answer needs more time.
Function names should be short, clear, and easy to search for.
Read the file, parse the header, and check every length twice.
A good test fails when the program is wrong, and only then.
The engine runs one step, sends its events, and runs the next step.
Nothing moves in the garden except the shadow of a cloud.
The orchestra tunes its strings as the hall grows dark.
Fresh paint, open windows, and a broom against the wall.
Where does the path go after the second gate?
How many stars can you count before the coffee is cold?
The map shows a lake, a forest, and a road that stops at the border.
My grandmother planted this tree when she was eleven years old.
A paper lantern floats down the stream, slowly turning.
Blue smoke rises from the chimney of the last house.
The dancer turns, stops, and listens to the silence.
High above the desert a balloon drifts toward the evening.
Somebody left an umbrella on the bench near the fountain.
The frozen harbor cracks and groans through the night.
Carefully she lifts the lid of the wooden box.
""".strip().splitlines()

KOREAN = """
고양이 한 마리가 창가에서 잠을 자고 있다.
바다 위로 붉은 해가 천천히 떠오른다.
오늘은 비가 와서 산책을 하지 않았다.
도서관은 여섯 시에 문을 닫습니다.
한국어와 영어를 함께 쓰는 문장입니다.
작은 배가 조용한 호수를 건너간다.
할머니는 마당에 나무를 심으셨다.
눈이 내리는 마을의 저녁 풍경 사진.
우주 비행사가 달에서 말을 타고 있다.
이 모델은 글과 그림과 영상을 만든다.
안녕하세요, 무엇을 도와드릴까요?
질문에 짧고 정확하게 대답해 주세요.
기차는 아홉 시 반에 바닷가로 떠난다.
푸른 하늘 아래 노란 꽃이 피어 있다.
강을 따라 걷다가 불빛이 보이면 멈추자.
""".strip().splitlines()

EMOJI = [
    "Sunny day 😀 and warm 🌞!",
    "Well done 👍🎉",
    "A cat 🐱 on a boat ⛵.",
    "I ❤️ rain ☔ and 🌊 waves.",
    "좋아요 👍 감사합니다 🙏",
]

TRAINING = SENTENCES + KOREAN + EMOJI

# Common to all tokenizers; each group adds its own special tokens.
STRINGS = [
    "",
    " ",
    "   ",
    "\n",
    "\t",
    "a",
    "Hello, world!",
    " leading space",
    "trailing space ",
    "  two  spaces   and    more  ",
    "line one\nline two\n\nline four",
    "windows\r\nlines\r\n",
    "tab\tseparated\t\tvalues",
    "   \n  mixed \t white\n\n   space  ",
    "The quick brown fox jumps over 13 lazy dogs.",
    "A small boat crosses the quiet lake before the sun comes up.",
    "Mixed CASE, lower case, and UPPER CASE WORDS",
    "iPhone eBay McDonald's O'Neil",
    "I can't, you're, they've, we'll, he'd, it's, I'm",
    "I CAN'T, YOU'RE, THEY'VE",
    "don\u2019t use \u201csmart\u201d quotes \u2014 or do \u2026",
    "12345 67 8 9,000,000.50 3.14159 1e-5 0xFF",
    "3개의 사과와 12권의 책",
    "안녕하세요, 세계!",
    "고양이 한 마리가 창가에서 잠을 자고 있다.",
    "바다 위로 붉은 해가 Rises slowly 천천히",
    "뷁 쀍 갃",
    "\u1100\u1161\u1102\u1161 decomposed hangul",
    "日本語と中文 mixed",
    "Привет, мир! Γειά σου",
    "مرحبا بالعالم",
    "😀",
    "A cat 🐱 on a boat ⛵.",
    "👨\u200d👩\u200d👧\u200d👦 family and 🏳\ufe0f\u200d🌈 flag",
    "👍🏽 skin tone, ❤\ufe0f heart, 🇰🇷 flag",
    "caf\u00e9 na\u00efve r\u00e9sum\u00e9 \u00c5ngstr\u00f6m",
    "cafe\u0301 nai\u0308ve re\u0301sume\u0301 A\u030angstro\u0308m",
    "\uff26\uff55\uff4c\uff4c \uff37\uff49\uff44\uff54\uff48 \uff11\uff12\uff13\uff01",
    "\u3000ideographic\u3000space",
    "non\u00a0breaking\u00a0space and\u2009thin",
    "zero\u200bwidth\u200bspace \ufeffbom",
    "\ufb01ne \ufb02ow \u00bd \u00b2 \u2122 \u2460 \u212b",
    "!!!???...,,,;;;:::",
    "--- *** ### $$$ %%% &&& @@@ ~~~",
    "(a[b]{c}<d>)/\\|`^_=+",
    "x = {'key': [1, 2, 3]}; print(x[\"key\"])",
    "https://example.com/path?query=1&other=two#frag",
    "Donaudampfschifffahrtsgesellschaftskapitaensmuetzenfabrik",
    "a" * 200,
    "\u2581already\u2581has\u2581marks",
    "\u0416\u16a0\U00010348\U0001f9ff\u2fd7 rare",
    "control\x01chars\x7f and \x00 nul",
    "&amp; &lt;b&gt; &#39;html&#39;",
    "\u0130stanbul \u00df\u1e9e \u03a3\u03c3\u03c2",
    "end with newline\n",
    "\u00e9\u0301\u0327 stacked marks",
    "pre-processing/post-processing, e.g. this; i.e. that",
]
