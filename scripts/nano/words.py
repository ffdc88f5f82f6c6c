"""Words that the model knows: numbers as words, and the nouns that are read, spelled, repeated and remembered."""

NUMBERS: tuple[str, ...] = tuple(
    (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty"
    ).split()
)
DIGITS = tuple(NUMBERS[:10])
# Of one to three syllables, none of which is the beginning of a sentence that the model says.
NOUNS = tuple(
    (
        "apple arm army baby bag ball banana basket bear bed bell berry bicycle bird boat bone book boot bottle "
        "bowl box bread bridge brush bucket butter button cabin cage cake camel camera candle car card carpet "
        "castle cat chain chair cheese cherry chicken city clock cloud coat coffee coin corn cotton cow crown cup "
        "curtain daisy desk dog doll donkey door dragon dress drum duck eagle ear egg elbow elephant engine eye "
        "family farm feather field finger fire fish flag flower flute foot forest fork fox frog garden gate ghost "
        "giraffe glass glove goat gold grape grass guitar hammer hand hat heart honey horse hospital house island "
        "jacket jar jelly judge juice key king kitchen kite kitten knife ladder lake lamp leaf lemon letter lion "
        "lizard lock magnet map market medal melon milk mirror monkey moon mountain mouse mouth music nail nest "
        "night nose nut ocean onion orange oven owl page paint paper parrot party pear pencil pepper photo piano "
        "picture pie pig pillow pilot pirate planet plate pocket pond potato prince pumpkin puppy queen rabbit "
        "radio rain ribbon ring river road robot rocket roof room rope rose salad salt sand school sea shadow "
        "sheep ship shirt shoe silver snake snow soap sofa song soup spider spoon star stone storm story street "
        "sugar summer sun sweater swan table tail teacher tent tiger tomato tooth tower town toy train tree truck "
        "trumpet turtle umbrella uncle valley village violin wagon wall watch water whale wheel window wing winter "
        "wolf wood yard zebra"
    ).split()
)
# What is answered about a written word.
IT_SAYS = "It says '{}'."
