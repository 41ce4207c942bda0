"""The built-in sample on which fidelity is judged: a few registers, short enough to run during a build.

Written for this project. Changing a word changes every measured KL and may change the outlier channels,
so old and new figures are not comparable.
"""

from __future__ import annotations

PROSE = (
    "The ferry left the island at dusk, later than the timetable promised. On the upper deck a woman "
    "in a green coat counted her change twice and then gave all of it to the boy who sold tea. Nobody "
    "spoke much. The engine had a cough in it, a regular little hesitation, and everyone aboard seemed "
    "to be listening for the moment when it would not start again. It always did. By the time the "
    "lighthouse came into view the clouds had lifted, and the mainland lay ahead like a long sentence "
    "with only a few words lit."
)

FACTS = (
    "Photosynthesis converts light energy into chemical energy. In plants it takes place in the "
    "chloroplasts, where chlorophyll absorbs mostly red and blue light. Water is split, oxygen is "
    "released, and carbon dioxide is fixed into sugars by the Calvin cycle. The capital of France is "
    "Paris, the capital of Japan is Tokyo, and the capital of Kenya is Nairobi. Water boils at 100 "
    "degrees Celsius at sea level, but at about 70 degrees on the summit of Mount Everest, because the "
    "air pressure there is only a third as high."
)

CODE = '''def merge_intervals(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins overlapping intervals; the input may come in any order."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


if __name__ == "__main__":
    assert merge_intervals([(5, 7), (1, 3), (2, 4)]) == [(1, 4), (5, 7)]
    print("all good")
'''

CHAT = (
    "User: My bread comes out dense every time. What am I doing wrong?\n"
    "Assistant: The usual causes are too little water, dead yeast, or not enough time. Three things to "
    "try:\n"
    "1. Weigh the flour instead of measuring it by the cup.\n"
    "2. Let the dough rise until it has doubled, even if that takes two hours.\n"
    "3. Bake it hotter at the start: 230 °C for fifteen minutes, then 200 °C.\n"
    "User: And how do I know when it is done?\n"
    "Assistant: Tap the bottom of the loaf. If it sounds hollow, it is ready; if not, give it five "
    "more minutes."
)

OTHER_LANGUAGES = (
    "Der Zug nach Basel fährt heute von Gleis sieben ab und hat etwa zehn Minuten Verspätung. Le "
    "marché ouvre à huit heures, mais les meilleurs fromages sont déjà vendus avant neuf heures. La "
    "biblioteca cierra los domingos, así que devolví los libros el sábado por la tarde. Il sole "
    "tramonta presto in dicembre, e le strade della città si riempiono di luci."
)

NUMBERS = (
    "Quarterly report, figures in thousands: revenue 4,812 (previous year 4,377, up 9.9 %), cost of "
    'goods 2,905, gross margin 39.6 %. Headcount rose from 61 to 68. {"region": "north", "orders": '
    '1204, "returned": 37, "rate": 0.0307} If a train travels 180 kilometres in one hour and thirty '
    "minutes, its average speed is 180 / 1.5 = 120 kilometres per hour. The sum of the first ten "
    "square numbers is 385."
)

SAMPLE_TEXTS: tuple[str, ...] = (PROSE, FACTS, CODE, CHAT, OTHER_LANGUAGES, NUMBERS)
