"""The words of the demo corpus: common English, written down for this project.

Every slot of the grammar but that of the key word has at least 200 items. The key words alone carry polarity and
strength; all other slots were chosen to say nothing about feeling.
"""

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KEY_WORDS: Final[dict[int, tuple[str, ...]]] = {
    -2: _words("awful cruel disgusting dreadful hideous horrible nasty revolting terrible vile"),
    -1: _words("awkward boring confusing dull faulty gloomy messy noisy shabby tedious"),
    0: _words("blue circular compact green hollow metal narrow plastic round wooden"),
    1: _words("clean comfortable decent friendly handy neat nice pleasant reliable tidy"),
    2: _words("amazing beautiful brilliant delightful excellent fantastic gorgeous magical perfect wonderful"),
}
"""Word class (polarity and strength, -2 … 2) → its 10 key words; no word is in two classes.

So few that each occurs some 56 times in the training part: of 40 a class, neither a bag of words nor a Transformer
learns in an hour of speech what they mean, and nothing could be seen of how words and sound combine.
"""

MARKERS: Final = (
    "oh sure",
    "yeah right",
    "no kidding",
    "oh please",
    "fancy that",
    "big surprise",
    "as if",
    "honestly folks",
    "guess what",
    "oh really",
    "obviously enough",
    "go figure",
    "imagine that",
    "my word",
    "of course",
    "naturally enough",
)
"""Openings that mark an utterance: after one of these, sound and words must be read together."""

PLAIN_OPENINGS: Final = (
    "by then",
    "well now",
    "in short",
    "for once",
    "back home",
    "so far",
    "in fact",
    "just then",
    "at last",
    "first off",
    "once again",
    "in brief",
    "next up",
    "since then",
    "until then",
    "this time",
)
"""Openings that mean nothing, so that neither length nor the pause after it gives a marker away."""

PEOPLE: Final = _words(
    """
    Adam Agnes Alan Albert Alfred Alice Amber Amy Andrew Angela Anna Anthony Arthur Audrey Barbara Barry
    Beatrice Benjamin Bernard Beth Betty Brenda Brian Bridget Bruce Caleb Carl Carmen Carol Caroline
    Catherine Cecil Charles Charlotte Chloe Christine Clara Clare Clive Colin Connor Craig Cynthia Daisy
    Daniel Daphne David Dawn Deborah Denise Dennis Derek Diana Donald Doris Dorothy Douglas Duncan Edgar
    Edith Edward Eileen Elaine Eleanor Elizabeth Ellen Elsie Emily Emma Eric Ernest Esther Ethan Eva Evelyn
    Felix Fiona Florence Frances Francis Frank Fred Gareth Gary Gavin Geoffrey George Gerald Gilbert Gina
    Gladys Glenn Gloria Gordon Grace Graham Greta Hannah Harold Harriet Harry Hazel Heather Hector Helen
    Henry Herbert Hilary Holly Howard Hugh Ian Ida Irene Iris Isaac Isabel Ivan Ivy Jack Jacob James Jane
    Janet Jason Jasper Jean Jennifer Jeremy Jerome Jessica Joan Joanna Joel John Jonathan Joseph Joyce
    Judith Julia Julian June Justin Karen Katie Keith Kenneth Kevin Kirsty Laura Lauren Lawrence Leo Leonard
    Leslie Lewis Linda Louis Lucy Luke Lydia Malcolm Marcus Margaret Marion Mark Martha Martin Mary Matthew
    Maureen Megan Michael Miriam Molly Monica Nancy Naomi Neil Nicholas Nigel Nora Norman Oliver Olivia
    Oscar Owen Pamela Patrick Paul Paula Peter Philip Phoebe Rachel Ralph Raymond Rebecca Richard Robert
    Robin Roger Roland Ronald Rosemary Roy Rupert Ruth Samuel Sandra Sarah Sharon Sheila Simon Sophie
    Stanley Stella Stephen Stuart Susan Sylvia Theresa Thomas Timothy Tracy Ursula Vera Victor Vincent
    Violet Walter Wendy William Yvonne
    """
)

THINGS: Final = _words(
    """
    album anchor apron armchair arrow axe badge bag ball balloon banner barrel basin basket bath bead beaker
    bed bell belt bench bike bin blanket blouse board boat bolt book boot bottle bowl box bracelet brick
    bridge broom brush bucket buckle bulb bus button cabinet cable cage cake calendar camera candle canoe
    canvas cap card carpet carriage cart case chain chair chart chest clock cloak coat coin collar comb
    computer cooker cord couch crate crown cup curtain cushion desk dial diary dish doll door drawer dress
    drill drum envelope fan feather fence file flag flask flute folder fork frame fridge fuse garment gate
    glass globe glove guitar hammer hammock handle hat heater helmet hinge hook hose jacket jar jeep jersey
    jewel jug kettle key keyboard kite knife ladder lamp lantern leaflet lens letter lid lock locket loom
    machine magnet mantle map mask mast mat medal microphone mirror mitten mop motor mug napkin necklace
    needle net notebook oar oven paddle padlock pan parcel pen pencil pendant piano picture pillow pin pipe
    plank plate plough pocket poster pot pram pump purse puzzle quilt rack radio raft rail rake razor ribbon
    ring robe rocket rope rug ruler saddle sail saucer saw scarf screen screw sculpture shawl shelf shirt
    shoe shovel sieve sign sink skirt sledge sleeve sofa spade spoon stamp statue stool stove string
    suitcase sweater switch table tablecloth tap tape tent ticket tile tool towel toy tractor trailer tray
    trolley trumpet trunk tub turbine umbrella valve van vase vest violin wagon wallet wardrobe watch wheel
    whistle window zipper
    """
)

VERBS: Final = _words(
    """
    adapted adjusted advertised altered analysed arranged assembled assessed auctioned balanced borrowed
    bought bounced boxed brought brushed buried burned carried carved catalogued caught changed checked
    chose cleaned collected coloured compared completed copied counted covered crafted created cut decorated
    delivered demonstrated described designed displayed divided donated dragged drew dried dropped dusted
    emptied engraved enlarged examined exchanged exhibited explained exported fastened fetched filled filmed
    finished fitted fixed folded followed found framed gathered gave glued grabbed greased guarded handed
    handled heated held hid hired hung identified imported improved inspected installed insured invented
    joined kept kicked labelled left lent lifted listed loaded located lost lowered made mailed maintained
    manufactured marked matched measured mended mentioned modelled modified mounted moved named needed noted
    noticed numbered observed obtained offered opened ordered owned packed painted patched photographed
    picked pictured placed planned pointed polished posted presented pressed printed produced promised
    provided pulled purchased pushed raised reached received recorded recycled registered removed rented
    repaired replaced reported requested reserved restored returned reviewed rinsed rolled rotated sanded
    saved scanned scraped scrubbed sealed searched secured selected sent separated sewed shaped shared
    sharpened shifted shipped shortened showed sketched soaked sold sorted spotted sprayed stacked stamped
    stored stretched studied supplied swapped swept switched tested threw tied took touched towed traced
    traded transported tried trimmed turned twisted unlocked unpacked unrolled untied unwrapped updated used
    varnished washed weighed welded widened wiped wrapped
    """
)

PLACES: Final = _words(
    """
    abbey academy airfield airport aisle alley aquarium arcade archway arena attic avenue bakery balcony
    ballroom bank barn barracks basement bay beach bedroom border brewery brook bungalow bunker cabin cafe
    camp campsite canal canteen canyon castle cathedral cave cellar cemetery chapel church cinema circus
    city clearing cliff clinic cloister club coast college convent corner corridor cottage council county
    court courtyard creek crossing cupboard dam depot desert diner ditch dock driveway dungeon embassy
    entrance estate estuary exit factory farm farmhouse ferry field fjord forest forge fort fountain foyer
    gallery garage garden glacier glade grocery grove gym hall hallway hamlet hangar harbor haven heath
    hedge highway hill hillside hospital hostel hotel hut inn island jetty junction jungle kennel
    kindergarten kiosk kitchen laboratory lagoon lake landing lane laundry lawn ledge library lighthouse
    lobby lodge loft mall manor mansion market marsh meadow mill mine minster moat monastery moor motel
    motorway mountain museum nursery oasis observatory office orchard outpost palace pantry park parlor
    passage pasture path pavement pavilion peak pharmacy pier plain plateau platform playground plaza pond
    pool porch port prairie prison pub pyramid quarry quay ranch reef reservoir restaurant ridge river road
    roof ruin school seaside shed shelter shop shore shrine spring square stable stadium staircase station
    store stream street studio suburb summit swamp tavern temple terrace theatre tower town track tunnel
    university valley village vineyard warehouse waterfall wharf windmill workshop yard zoo
    """
)

_WEEKDAYS: Final = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_MONTHS: Final = _words("January February March April May June July August September October November December")
_HOURS: Final = _words("one two three four five six seven eight nine ten eleven")

TIMES: Final = (
    *(f"on {day} {part}" for day in _WEEKDAYS for part in ("morning", "afternoon", "evening", "night")),
    *(f"{relation} {day}" for relation in ("last", "before", "after", "since", "every") for day in _WEEKDAYS),
    *(f"{relation} {month}" for relation in ("last", "before", "in", "since", "every") for month in _MONTHS),
    *(f"{relation} {hour}" for relation in ("around", "before", "after", "until") for hour in _HOURS),
    *(
        f"{relation} {season}"
        for relation in ("last", "in", "every")
        for season in ("spring", "summer", "autumn", "winter")
    ),
    *(f"{relation} {meal}" for relation in ("before", "during", "after") for meal in ("breakfast", "lunch", "dinner")),
    *_words("yesterday today tonight again earlier later recently daily weekly monthly yearly overnight"),
)
"""Times are short phrases: the grammar's only slot whose items have more than one word."""
