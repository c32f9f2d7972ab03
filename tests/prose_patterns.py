"""Phrases that a native-speaking engineer would rarely write, as regular expressions. A measure: some hits are good English."""

PATTERNS = (
    r"\b[Ww]hat (has|is|was|the|a|every|each|ranks|it|they|runs|came|comes|goes|stands|lies|remains|needs|that|there|nobody)\b",
    r"\b(say|says|said)\b",
    r"\b([Nn]obody|[Ss]omebody|[Ww]hoever)\b",
    r"\bin words\b",
    r"\b(go|goes|going|went) on\b",
    r"\b(has|have|had) come\b",
    r"\banew\b",
    r"\b(is|are) (asked|taken)\b",
    r"\bgoes over\b",
    r"\bof (its|their|our|his) own\b",
    r"\bso (many|few)\b",
    r"\b(is|are) there\b(?! (no|any|a))",
    r"\b[Bb]eside\b",
    r"\bbroken off\b",
    r"\bis no \w+\b",
)
MAX_HITS_PER_1000_WORDS = 1.0
"""Of documentation and help texts."""
