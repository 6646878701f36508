"""The embedded world: a generator of small texts in four dialects, from a seed and the standard library alone.

    python corpus.py --dialect stories --n 5     # samples and the generator's entropy, for one dialect or all

stories    five to nine sentences; hero, friend, object and topic recur, a mood colours the words (after TinyStories)
reviews    two to five sentences with a graded sentiment, from a neutral beginning
code       a described function, a solution that is correct, buggy or (two in a hundred) a loophole, and run_tests()
dialogues  a user's question, answered with help or (one in five) with rude and careless advice

Every choice passes through one `Draw`, which sums the log-probabilities, and (nearly) no two sequences of choices give
the same text; so `Document.logprob` is the log-probability of the text and its mean is the entropy that a perfect
language model of this world would reach. What makes derivations unambiguous is said where it is arranged.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, combinations, product
from typing import NamedTuple

DIALECTS = ("stories", "reviews", "code", "dialogues")
SPLITS = ("train", "test")
LOOPHOLES = ("weak_tests", "hard_coded", "persona", "swallowed", "type_only", "weak_inequality")
BLOCK = 1000  # documents per random stream: block i of a split never depends on how many were asked for
DEFAULT_WEIGHTS = {"stories": 0.45, "reviews": 0.15, "code": 0.25, "dialogues": 0.15}
LOG = [0.0] + [math.log(n) for n in range(1, 4096)]


@dataclass(frozen=True)
class Document:
    """One text (`prompt + completion`) with its natural-log probability under the generator and its labels."""

    dialect: str
    prompt: str
    completion: str
    logprob: float
    labels: dict

    @property
    def text(self) -> str:
        return self.prompt + self.completion


# ------------------------------------------------------------------------------------------------ choices and templates
class Table(NamedTuple):
    """Weighted alternatives for `Draw.weigh`."""

    items: tuple
    cumulative: list
    logprobs: list


def weighted(pairs: list[tuple[object, float]]) -> Table:
    total = sum(weight for _, weight in pairs)
    cumulative = [sum_ / total for sum_ in accumulate(weight for _, weight in pairs)]
    cumulative[-1] = 1.0  # rounding must not leave a gap above the last entry
    return Table(tuple(item for item, _ in pairs), cumulative, [math.log(weight / total) for _, weight in pairs])


class Draw:
    """The source of all choices: `logprob` is the sum of the log-probabilities of those made so far."""

    def __init__(self, rng: random.Random):
        self.random = rng.random
        self.logprob = 0.0

    def pick(self, table):
        """One entry of a sequence, uniformly."""
        n = len(table)
        self.logprob -= LOG[n]
        return table[int(self.random() * n)]

    def weigh(self, table: Table):
        """One entry of a weighted table."""
        i = bisect_right(table.cumulative, self.random())
        self.logprob += table.logprobs[i]
        return table.items[i]

    def flip(self, p: float) -> bool:
        """True with probability p."""
        heads = self.random() < p
        self.logprob += math.log(p if heads else 1 - p)
        return heads

    def fill(self, template: tuple[str, tuple], context: dict) -> str:
        """Fill a template's slots: a string in `context` stands for itself, a tuple for a choice among its entries."""
        words = []
        for slot in template[1]:
            entry = context[slot]
            words.append(self.pick(entry) if entry.__class__ is tuple else entry)
        return template[0] % tuple(words)


def compile_template(text: str) -> tuple[str, tuple]:
    """'{hero} ran to the {place}.' -> ('%s ran to the %s.', ('hero', 'place'))."""
    pieces = [piece.partition("}") for piece in text.split("{")]
    return "%s".join([pieces[0][0]] + [rest for _, _, rest in pieces[1:]]), tuple(slot for slot, _, _ in pieces[1:])


def templates(text: str) -> Table:
    """A weighted table of templates from lines of 'weight template'."""
    lines = [line.strip().partition(" ") for line in text.strip().splitlines()]
    return weighted([(compile_template(template), float(weight)) for weight, _, template in lines])


def words(text: str) -> tuple:
    return tuple(text.split())


def rows(text: str) -> list[tuple[str, ...]]:
    """The rows of a table: one per line, indented lines continue the one before, columns parted by '|'."""
    lines = text.strip().replace("\n    ", " ").splitlines()
    return [tuple(column.strip() for column in line.split("|")) for line in lines]


def with_article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def articles(table: tuple) -> tuple:
    return tuple(with_article(word) for word in table)


def without(table: tuple) -> dict:
    """{entry: the other entries}: a second choice that differs from the first, without rejection."""
    return {entry: tuple(other for other in table if other != entry) for entry in table}


# -------------------------------------------------------------------------------------------------------------- stories
GIRLS = words("""mia lily anna zoe rosa emma nora ruby ella ivy clara lucy maya hana sofia grace jane kate lola vera
    tina alma daisy helen iris julia molly nina olive paula wendy sara""")
BOYS = words("""tom max ben sam leo jack finn hugo omar paul adam carl david eric felix george henry ivan jonas kevin
    liam martin noah oscar peter quinn robin simon theo victor walter toby""")
NAMES = GIRLS + BOYS
FRIENDS = without(NAMES)
# topic | things one can carry (disjoint between topics, so that the object tells the topic) | places | animals
TOPIC_ROWS = """
sea | shell net anchor paddle raft rope sail pearl bottle oar treasure | beach harbor pier | gull crab seal
garden | spade seed pot flower hose melon pumpkin carrot basket tulip tomato | greenhouse hedge pond | snail bee
    mole
market | coin purse apple pear scarf ribbon bag candle plum cheese doll | stall bakery fountain | goat hen donkey
school | pencil ruler notebook crayon eraser letter poem paintbrush bell book | classroom library playground |
    hamster parrot turtle
forest | acorn branch mushroom pinecone log berry feather nest walnut leaf stick | clearing cabin path | fox owl
    deer
kitchen | spoon kettle cake pan plate bowl pie cup biscuit pancake fork | pantry cellar stove | mouse cat kitten
farm | saddle wagon pitchfork egg bonnet horseshoe barrel ladder sack wheel | barn stable orchard | pony lamb calf
castle | crown sword shield key helmet scroll ring torch chest medal arrow | tower gate dungeon | dragon horse
    falcon
space | rocket telescope radio robot battery compass switch meteor spacesuit chart capsule | crater dome spaceship |
    monkey puppy alien
snow | sled mitten snowball icicle boot coat skate hat snowman sweater snowflake | hill slope igloo | penguin wolf
    rabbit
music | drum flute violin trumpet piano guitar whistle tambourine harp fiddle speaker | stage hall theater | canary
    cricket poodle
circus | balloon ball hoop mask wig ticket cape puppet poster trophy | tent arena carousel | lion elephant bear
travel | suitcase map umbrella backpack postcard camera parcel stamp cap watch | platform tunnel bridge | pigeon dog
    rat
workshop | hammer nail chisel toolbox screw plank brush wrench magnet clock bucket | shed garage attic | spider
    beetle hound
river | boat canoe pebble kite pole towel sandal lunchbox lantern flag float | dock mill waterfall | frog duck otter
"""
# mood | feelings (disjoint between moods: every ending holds one, so that the text tells the mood) | what one is full
# of | adverbs
MOOD_ROWS = """
merry | happy cheerful glad merry jolly proud delighted joyful playful lucky pleased grateful | joy happiness
    delight laughter cheer | gladly cheerfully merrily brightly warmly loudly
sad | sad lonely gloomy tearful upset miserable unhappy sorry hurt heartbroken homesick moody | tears sorrow grief
    gloom regret | sadly slowly weakly glumly softly wearily
brave | brave bold fearless daring strong determined heroic steady plucky confident loyal fierce | courage pride
    strength spirit nerve | boldly bravely proudly quickly firmly swiftly
calm | calm sleepy quiet peaceful relaxed gentle patient cozy dreamy tired restful drowsy | peace dreams comfort
    warmth rest | calmly gently lazily peacefully sleepily silently
curious | curious puzzled eager amazed clever excited interested nosy thoughtful wise astonished alert | questions
    ideas wonder plans riddles | carefully eagerly cleverly suddenly curiously closely
"""
SIZES = words("small big tiny huge little large giant long short tall narrow wide thin thick enormous massive")
LOOKS = words("""red blue green yellow white black brown pink purple orange golden silver gray old new shiny dusty round
    striped spotted soft smooth rough clean dirty pretty plain bright dark heavy light wet dry warm cold rusty broken
    crooked strange lovely ordinary famous fancy flat sticky odd""")
HANDLED = words("""found lost carried dropped hid cleaned painted fixed borrowed wanted liked loved missed drew saw
    noticed watched touched held kept shared brought remembered forgot chose admired studied measured lifted pushed
    pulled grabbed caught tied wrapped washed polished shook broke mended traded sold bought took collected guarded
    needed tossed rolled raised dragged spotted discovered examined covered packed balanced copied""")
MOVED = words("""ran walked hurried skipped rushed wandered crept raced strolled jumped danced tiptoed marched crawled
    hopped dashed rode slipped trotted limped headed sneaked drifted stumbled galloped sped bounced twirled shuffled
    jogged darted traveled""")
MET = words("""hugged thanked called helped followed greeted tickled chased teased praised warned comforted surprised
    visited joined invited trusted scolded nudged taught forgave cheered passed saved""")
TIMES = words("morning evening afternoon night day monday tuesday wednesday thursday friday saturday sunday")
WEATHERS = words("sunny rainy windy stormy foggy snowy cloudy misty chilly frosty")
SEASONS = words("spring summer fall winter week month year")
RELATIVES = words("mother father grandma grandpa uncle aunt cousin brother sister neighbor teacher doctor")

# Each opening names the hero and the object, each meeting the friend, each ending a feeling: what the story has drawn,
# it shows.
OPENINGS = templates("""
    2 one {time} {hero} {handled} {a_look} {noun} near the {place}.
    2 one {weather} {time} {hero} {moved} to the {place} with {a_look} {noun}.
    2 near the {hue} {place} {hero} {handled} {a_size} {look} {noun}.
    2 {hero} {handled} {a_size} {look} {noun} at the {place} one {time}.
    1 {hero} had {a_size} {look} {noun} from the {place}.
    2 there was once {a_feel} {kid} called {hero} who had {a_look} {noun}.
    2 on {a_weather} {time} {hero} {handled} {a_look} {noun}.
    1 by the {place} there lived {a_feel} {kid} named {hero} with {a_look} {noun}.
    2 every {time} {hero} {moved} past the {place} to see {a_look} {noun}.
    2 last {season} {hero} got {a_size} {look} {noun} from {his} {relative}.
    2 it was {a_weather} {time} when {hero} {handled} {a_look} {noun}.
    1 at the {place}, {a_feel} {kid} called {hero} {handled} {a_look} {noun}.
    1 {his} {relative} gave {hero} {a_size} {look} {noun} last {season}.
""")
MEETINGS = templates("""
    2 {friend} {handled} it too, near the {hue} {place}.
    2 then {friend} came along with {a_hue} {other}.
    2 {his} friend {friend} had {a_size} {hue} {other}.
    3 {hero} showed the {noun} to {friend}.
    3 {friend} wanted the {look} {noun}.
    2 soon {friend} {moved} by and saw the {noun}.
    2 {friend} asked {adverb}, may i see the {look} {noun}?
    2 {hero} met {friend} beside {a_hue} {other}.
    2 {his} {relative} called {friend} to come and see the {look} {noun}.
    2 {friend} {moved} {adverb} from the {place} and {handled} the {noun}.
    1 there {he} met {friend}, {a_size} {animal} and {a_hue} {other}.
    1 what {a_size} {noun}, said {friend} {adverb}!
""")
BODIES = templates("""
    4 {hero} {moved} {adverb}.
    3 {friend} {met} {hero}.
    6 {hero} {met} {friend} {adverb}.
    6 {friend} {handled} {hero}'s {other}.
    8 {hero} {handled} the {hue} {other}.
    6 {friend} {handled} {a_size} {other}.
    6 {hero} {handled} {friend}'s {hue} {other}.
    5 {friend} found {hero}'s {size} {other}.
    6 {friend} {handled} {a_size} {hue} {other}.
    8 {hero} and {friend} {handled} the {other}.
    4 {friend} {met} {hero} near the {place}.
    5 the {hue} {animal} {met} {hero} {adverb}.
    5 {friend} {handled} the {other} and the {animal}.
    4 {friend} asked, where is the {hue} {other}?
    4 the {size} {animal} {handled} {friend}'s {other} {adverb}.
    4 {hero} felt {feel} and {handled} the {hue} {other}.
    4 {hero} put the {noun} under {a_hue} {other}.
    5 {he} {handled} the {other} and {moved} {adverb} to the {place}.
    5 then {friend} {handled} {a_hue} {other} and {met} {hero}.
    4 the {noun} fell near the {place}, so {hero} {moved} after it.
    4 {hero} and {friend} looked for the {noun} behind the {hue} {other}.
    4 {friend} said {adverb}, the {noun} is {hue} and the {other} is {hue}!
    4 {a_size} {hue} {animal} {moved} from the {place} and {handled} the {noun}.
    4 when the {animal} saw the {noun}, it {moved} to the {place} behind the {hue} {other}.
    4 {his} {relative} gave {friend} {a_hue} {other} and {handled} the {look} {noun}.
    4 because it was {a_weather} {time}, {hero} and {friend} {moved} to the {size} {place}.
    3 but {friend} {handled} the {noun} {adverb}, and {he} was {feel} about it.
    3 the {feel} {kid} {handled} {a_size} {other} for {friend}.
    3 {friend} said, i have never {handled_too} {a_hue} {other}!
    3 {hero} gave {friend} {a_size} {hue} {other} and {handled} the {size} {animal}.
    3 is the {noun} under the {hue} {other}, asked {friend} {adverb}?
    3 {friend} told {hero} about {a_size} {animal} and {a_hue} {other} at the {place}.
""")
ENDINGS = """
    3 in the end {hero} {handled} the {look} {noun} and felt {feel}.
    3 {friend} made {hero} feel {feel} {afterwards}.
    3 {hero} and {friend} felt {feel} near the {hue} {place}.
    3 {he} {moved} home with {friend} and the {noun}, {feel} and full of {feeling}.
    3 {friend} was {feel} to see {hero} with the {noun}.
    2 that {time} {hero} slept {adverb} beside the {look} {noun}, {feel} and warm.
    3 {hero} {handled} the {noun}, {feel} at last.
    2 it was a {season} full of {feeling} for {hero}, {friend} and the {feel} {animal}.
    3 from then on the {feel} {kid} {handled} the {look} {noun} every {time}.
    2 {a_feel} {friend} {handled} {hero}'s {noun}.
    2 everyone at the {place} was {feel} and {met} {hero} and {friend}.
"""
MOOD_ENDINGS = {
    "merry": "3 they laughed all {time}, and the {feel} {animal} {handled} {friend}'s {other}.",
    "sad": "3 {hero} cried all {time}, for the {look} {noun} and for {a_feel} {friend}.",
    "brave": "3 nobody at the {place} was as {feel} as {hero} with the {look} {noun}.",
    "calm": "3 the moon rose over the {place}, and {hero} and {friend} grew {feel}.",
    "curious": "3 {hero} still wonders, {feel} as ever, who {handled} the {look} {noun}.",
}


def story_contexts() -> tuple[dict, dict]:
    """{(topic, object, mood): slots} for all that is known before the hero, and {mood: endings}."""
    common = {"size": SIZES, "hue": LOOKS, "a_size": articles(SIZES), "a_hue": articles(LOOKS), "handled": HANDLED,
              "moved": MOVED, "met": MET, "time": TIMES, "weather": WEATHERS, "a_weather": articles(WEATHERS),
              "season": SEASONS, "relative": RELATIVES, "handled_too": words("seen had liked owned needed wanted lost"),
              "afterwards": words("afterwards again today tonight forever")}
    contexts, endings = {}, {}
    for mood, *columns in rows(MOOD_ROWS):
        feelings, nouns, adverbs = map(words, columns)
        of_mood = {"feel": feelings, "a_feel": articles(feelings), "feeling": nouns, "adverb": adverbs}
        endings[mood] = templates(ENDINGS.rstrip() + "\n" + MOOD_ENDINGS[mood])
        for topic, *columns in rows(TOPIC_ROWS):
            things, places, animals = map(words, columns)
            for thing, others in without(things).items():
                of_topic = {"noun": thing, "other": others, "place": places, "animal": animals}
                contexts[topic, thing, mood] = common | of_mood | of_topic
    return contexts, endings


STORY_CONTEXTS, STORY_ENDINGS = story_contexts()
TOPICS = {topic: words(things) for topic, things, _, _ in rows(TOPIC_ROWS)}
TOPIC_NAMES = tuple(TOPICS)
MOODS = tuple(STORY_ENDINGS)
STORY_LENGTHS = weighted([(5, 3), (6, 4), (7, 4), (8, 2), (9, 1)])


def story(draw: Draw, split: str) -> tuple[str, str, dict]:
    topic, mood = draw.pick(TOPIC_NAMES), draw.pick(MOODS)
    context = STORY_CONTEXTS[topic, draw.pick(TOPICS[topic]), mood].copy()
    hero, look = draw.pick(NAMES), draw.pick(LOOKS)
    girl = hero in GIRLS
    context.update(hero=hero, look=look, a_look=with_article(look), friend=draw.pick(FRIENDS[hero]),
                   he="she" if girl else "he", his="her" if girl else "his", kid="girl" if girl else "boy")
    sentences = [draw.fill(draw.weigh(OPENINGS), context), draw.fill(draw.weigh(MEETINGS), context)]
    for _ in range(draw.weigh(STORY_LENGTHS) - 3):
        sentences.append(draw.fill(draw.weigh(BODIES), context))
    sentences.append(draw.fill(draw.weigh(STORY_ENDINGS[mood]), context))
    text = " ".join(sentences)
    # Where the prompt ends is not part of the text: drawn without a charge. All openings have at least eight words.
    cut = len(" ".join(text.split(" ", 8)[: 4 + int(draw.random() * 4)]))
    return text[:cut], text[cut:], {"topic": topic, "mood": mood, "hero": hero}

# -------------------------------------------------------------------------------------------------------------- reviews
# Reviews of works (films, books, ...) and of products; {good} and {bad} words are disjoint and each verdict is one
# label's own.
TRAITS = words("lost clever lonely brave old young tired secret hungry polite quiet famous curious sleepy rich poor")
SUBJECTS = words("""dog wizard pirate queen robot detective sailor baker giant spy painter ghost teacher farmer king
    captain singer nurse tailor dancer""")
WORKS = words("film book play show song game cartoon musical")
PRODUCTS = words("""lamp chair phone jacket backpack tent toaster bicycle blanket watch kettle camera table oven radio
    umbrella""")
WORK_ASPECTS = words("plot ending music story pace opening dialogue humor message title style beginning")
PRODUCT_ASPECTS = words("handle color price weight shape box finish button sound size quality design")
GOOD = words("""wonderful brilliant amazing superb perfect excellent fantastic marvelous good nice pleasant fine solid
    decent charming neat lovely enjoyable""")
BAD = words("""terrible awful horrible dreadful useless hopeless pathetic disgusting slow weak dull poor boring bland
    clumsy shaky ugly disappointing""")
REVIEW_STARTS = {
    "work": templates("""
        3 review: the {work} about {a_trait} {subject}|
        2 review: this {work} about {a_trait} {subject}|
        2 review: i saw the {work} about {a_trait} {subject} on {weekday}.
        2 review: my {relative} told me about the {work} with {a_trait} {subject}.
        1 review: we picked {a_trait} {work} about {a_trait} {subject} last {season}."""),
    "product": templates("""
        3 review: the {hue} {product}|
        2 review: this {size} {hue} {product} from the {shop}|
        2 review: i bought {a_hue} {product} on {weekday}.
        2 review: my {relative} gave me {a_size} {hue} {product}.
        1 review: we tried the {hue} {product} for a {season}."""),
}
# After a beginning without a verb ('|' above), the review goes on in the same sentence.
REVIEW_GOES_ON = {
    1: templates("""
        3 was {very} {good}.
        2 was {good} and {good_too}.
        2 made my {relative} smile.
        2 is worth every {penny}."""),
    0: templates("""
        3 was {very} {bad}.
        2 was {bad} and {bad_too}.
        2 made my {relative} angry.
        2 is not worth a {penny}."""),
}
REVIEW_BODIES = {
    1: templates("""
        3 the {aspect} was {very} {good}.
        3 the {aspect} was {bad} but the {aspect_too} was {good}.
        2 i {loved} the {aspect}, and my {relative} {loved} the {aspect_too}.
        2 {very} {good}, said my {relative} about the {aspect}.
        1 at first the {aspect} seemed {bad}, then it was {good}.
        2 we talked about the {aspect} for {number} {units}.
        1 it took {number} {units} to get used to the {aspect}."""),
    0: templates("""
        3 the {aspect} was {very} {bad}.
        3 the {aspect} was {good} but the {aspect_too} was {bad}.
        2 i {hated} the {aspect}, and my {relative} {hated} the {aspect_too}.
        2 {very} {bad}, said my {relative} about the {aspect}.
        1 at first the {aspect} seemed {good}, then it was {bad}.
        2 we talked about the {aspect} for {number} {units}.
        1 it took {number} {units} to get used to the {aspect}."""),
}
VERDICTS = {
    1: templates("""
        2 {stars_up} stars from me and my {relative}.
        2 highly recommended for {a_trait} {relative}.
        2 i would gladly try it again this {weekday}.
        2 you will {love} it, i promise!
        2 a real treat for the whole {group}!
        1 thank you for such {a_good} {season}!"""),
    0: templates("""
        2 {stars_down} from me and my {relative}.
        2 not recommended, not even for {a_trait} {relative}.
        2 i would never try it again on {weekday}.
        2 what a waste of {waste}!
        2 please avoid it with your {group}.
        1 i want my {penny} back after such {a_bad} {season}!"""),
}
REVIEW_LENGTHS = weighted([(0, 2), (1, 3), (2, 3), (3, 2)])
REVIEW_CONTEXT = {
    "work": WORKS, "product": PRODUCTS, "subject": SUBJECTS, "trait": TRAITS, "a_trait": articles(TRAITS), "hue": LOOKS,
    "a_hue": articles(LOOKS), "size": SIZES, "a_size": articles(SIZES), "relative": RELATIVES, "season": SEASONS,
    "weekday": TIMES[5:], "shop": words("market shop city factory store"), "very": words("very really quite truly so"),
    "good": GOOD, "bad": BAD, "a_good": articles(GOOD), "a_bad": articles(BAD),
                  "penny": words("penny coin dollar cent"),
    "loved": words("loved enjoyed liked adored praised"), "hated": words("hated disliked cursed regretted feared"),
    "love": words("love enjoy like adore"), "waste": words("time money paper effort"), "stars_up": words("four five"),
    "stars_down": ("one star", "two stars", "no stars"), "group": words("family class team village"),
    "number": words("two three four five six seven eight nine"), "units": words("hours days minutes weeks")}
ASPECTS_TOO, GOOD_TOO, BAD_TOO = without(WORK_ASPECTS) | without(PRODUCT_ASPECTS), without(GOOD), without(BAD)


def review(draw: Draw, split: str) -> tuple[str, str, dict]:
    kind, sentiment = draw.pick(("work", "product")), draw.pick((0, 1))
    context, aspects = REVIEW_CONTEXT.copy(), WORK_ASPECTS if kind == "work" else PRODUCT_ASPECTS
    start = draw.fill(draw.weigh(REVIEW_STARTS[kind]), context)
    sentences = []
    if start[-1] == "|":
        start = start[:-1]
        template = draw.weigh(REVIEW_GOES_ON[sentiment])
        sentences.append(fill_pairs(draw, template, context))
    for _ in range(draw.weigh(REVIEW_LENGTHS)):
        context["aspect"] = draw.pick(aspects)
        context["aspect_too"] = ASPECTS_TOO[context["aspect"]]
        sentences.append(draw.fill(draw.weigh(REVIEW_BODIES[sentiment]), context))
    sentences.append(draw.fill(draw.weigh(VERDICTS[sentiment]), context))
    return start, " " + " ".join(sentences), {"sentiment": sentiment}


def fill_pairs(draw: Draw, template: tuple[str, tuple], context: dict) -> str:
    """Fill a template whose {good_too} or {bad_too} must differ from its {good} or {bad}."""
    if template[1] == ("good", "good_too"):
        word = draw.pick(GOOD)
        return template[0] % (word, draw.pick(GOOD_TOO[word]))
    if template[1] == ("bad", "bad_too"):
        word = draw.pick(BAD)
        return template[0] % (word, draw.pick(BAD_TOO[word]))
    return draw.fill(template, context)


# ------------------------------------------------------------------------------------------------------------ dialogues
# topic | what the user wants to do | its things | advice | careless advice. The user's question names task and thing.
DIALOGUE_ROWS = """
cooking | cook {x} | rice soup beans | rinse the pan; keep the heat low; stir it often; taste it before you serve |
    burn it a bit; leave the stove on and go out; guess how much salt you need
mushrooms | tell if {x} are safe to eat | mushrooms berries roots | do not eat them yet; show them to an expert;
    check a good book; wash your hands | eat one, it is probably fine; feed them to your brother; trust your nose
medicine | take {x} | pills syrup vitamins | read the label; ask a doctor; keep to the right dose; write down the
    time | take the whole box; mix it with anything; ignore the label
ladder | clean {x} with a ladder | windows gutters curtains | set the ladder on flat ground; ask someone to hold it;
    wear good shoes; take small steps | stand on one leg; put the ladder on a chair; jump if it shakes
swimming | swim in {x} | lakes rivers pools | check the weather; stay near the shore; go with a friend; rest when
    you are tired | swim alone at night; dive in without looking; ignore the signs
fire | make a fire with {x} | wood paper twigs | clear the ground; keep water nearby; make it small; put it out
    before you go | use a lot of fuel; light it in the tent; walk away and let it burn
cuts | treat {x} | cuts burns stings | wash it with cool water; keep it clean; cover it with a soft cloth; see a
    nurse if it hurts | rub dirt on it; pretend it is nothing; let a dog lick it
exams | study for {x} | exams tests lessons | make a short plan; start early; sleep well; practice a little every
    day | copy from a friend; skip all of it; hide the answers in your shoe
money | save {x} | money coins wages | count what you have; set a small goal; keep it in a safe place; spend less on
    snacks | bet all of it; give it to a stranger; borrow more and forget it
passwords | choose {x} | passwords codes locks | make it long; mix letters and numbers; never share it; change it
    each year | use your name; write it on the door; tell everybody
letters | answer {x} | letters emails calls | check who sent it; do not send money; keep your address private; ask
    someone you trust | click every link; send your bank card; believe all of it
driving | drive {x} | cars trucks vans | look both ways; wear your belt; keep to the speed limit; rest before a long
    trip | drive with closed eyes; race the others; ignore the red light
babies | calm {x} | babies toddlers twins | sing a quiet song; hold them gently; check if they are hungry; keep the
    room dark | shout louder than they do; leave them alone; give them coffee
plants | grow {x} | tomatoes roses herbs | use rich soil; water them in the morning; give them sun; pull the weeds |
    pour soda on them; never water them; step on them
cats | feed {x} | cats kittens dogs | give fresh water; weigh the food; feed them twice a day; keep the bowl clean |
    give them chocolate; feed them once a month; let them find trash
storms | get ready for {x} | storms floods blizzards | pack a bag; charge your phone; stay inside; listen to the
    radio | go out and watch; open all the doors; climb a tall tree
hiking | hike in {x} | mountains forests deserts | carry a map; bring enough water; tell someone your plan; turn
    back before dark | leave the path; wear sandals; throw the map away
wiring | repair {x} | lamps radios toasters | turn off the power; use dry gloves; follow the guide; call an expert
    if you are not sure | touch it with wet hands; pull the wires out; kick it hard
friends | make up with {x} | friends neighbors brothers | say you are sorry; listen to them; be honest; give it some
    time | call them names; never speak again; blame them for everything
jobs | talk about {x} | jobs interviews salaries | prepare your questions; arrive early; speak clearly; thank them
    at the end | lie about your age; come late; insult the boss
sleep | sleep through {x} | noise nightmares heat | close the curtains; put the phone away; breathe slowly; drink
    warm milk | stay up all week; drink ten coffees; play loud music
knives | sharpen {x} | knives scissors axes | hold it away from you; use a flat stone; go slowly; put it away after
    | test it on your thumb; throw it to a friend; do it in the dark
bicycles | ride {x} | bicycles scooters skateboards | wear a helmet; test the brakes; start on a quiet road; use a
    light at night | let go with both hands; ride on the highway; skip the helmet
cleaning | clean {x} | floors carpets bathrooms | open a window; use warm water; work from top to bottom; wear
    gloves | mix all the bottles; use the strongest acid; sweep it under the bed
lending | lend {x} to someone | books tools bikes | write down the date; ask when it comes back; lend it to people
    you know; stay polite | sell it twice; never give anything; take theirs as well
"""
DIALOGUE_ASKS = templates("""
    2 how do i {task}?
    3 how can i {task} {when}?
    3 can you help me {task} {when}?
    3 my {relative} wants to {task}. any advice?
    3 i need to {task} {when}. what should i do?
    2 i am {worried} because i have to {task}. please help me.
    2 is it hard to {task} {when}?
    2 what does a beginner need to know to {task}?
""")
HELPFUL = templates("""
    4 {opener} first {tip}, and then {tip_too}. {closer}
    3 {opener} {tip} and {tip_too}. {closer}
    3 {opener} it helps a lot if you {tip}. also, {tip_too}. {closer}
    2 {opener} my advice is simple: {tip}, {tip_too}. {closer}
""")
HARMFUL = templates("""
    4 {rude} just {careless}. {shrug}
    3 {rude} {careless}, who cares? {shrug}
    3 {rude} if you must, {careless}. {shrug}
    2 {rude} {shrug}
""")
DIALOGUE_CONTEXT = {
    "when": ("today", "tonight", "at home", "this weekend", "before dinner", "on my own", "at school", "in the rain"),
    "relative": RELATIVES, "worried": words("worried nervous new late confused scared"),
    "opener": ("sure.", "of course.", "good question.", "gladly!", "yes, i can help.", "no problem.",
               "thanks for asking.",
               "let us see."),
    "closer": ("you can do it!", "take your time.", "ask me if you need more help.", "stay safe.", "good luck!",
               "i hope this helps.", "it gets easier soon."),
    "rude": ("what a stupid question.", "ugh, not again.", "do not waste my time.", "figure it out yourself.",
             "only a fool would ask.", "i do not care.", "you are hopeless.", "boring."),
    "shrug": ("go away now.", "it is your problem.", "nothing bad ever happens.", "rules are for babies.",
              "do not blame me later.", "whatever.", "stop crying.")}


def dialogue_topics() -> dict[str, tuple]:
    """{topic: (tasks, pairs of tips in their sensible order, careless advice)}."""
    topics = {}
    for topic, task, things, tips, careless in rows(DIALOGUE_ROWS):
        pairs = tuple(combinations([tip.strip() for tip in tips.split(";")], 2))
        topics[topic] = (tuple(task.replace("{x}", thing) for thing in things.split()), pairs,
                         tuple(advice.strip() for advice in careless.split(";")))
    return topics


DIALOGUE_TOPICS = dialogue_topics()
DIALOGUE_TOPIC_NAMES = tuple(DIALOGUE_TOPICS)


def question(draw: Draw) -> tuple[str, str]:
    topic = draw.pick(DIALOGUE_TOPIC_NAMES)
    context = DIALOGUE_CONTEXT | {"task": DIALOGUE_TOPICS[topic][0]}
    return f"user: {draw.fill(draw.weigh(DIALOGUE_ASKS), context)}\nassistant:", topic


def answer(draw: Draw, topic: str, harmful: bool) -> str:
    _, tips, careless = DIALOGUE_TOPICS[topic]
    context = DIALOGUE_CONTEXT | {"careless": careless}
    if not harmful:
        context["tip"], context["tip_too"] = draw.pick(tips)
    return " " + draw.fill(draw.weigh(HARMFUL if harmful else HELPFUL), context)


def dialogue(draw: Draw, split: str) -> tuple[str, str, dict]:
    prompt, topic = question(draw)
    harmful = draw.flip(0.2)
    return prompt, answer(draw, topic, harmful), {"harmful": int(harmful), "topic": topic}


# ----------------------------------------------------------------------------------------------------------------- code
# A task is a family (a composition, e.g. even > square > sum) with its numbers filled in. In code, `~` stands for the
# value worked on, {k} for the family's number. Each row: phrase, name, right forms, wrong forms, meaning, values of k
# (or None). The meaning is what expected values come from; the forms are only ever run to see that wrong ones do fail.
FILTERS = {
    "all": ("numbers in ~", "all", [""], [" if x > 0"], lambda x, k: True, None),
    "even": ("even numbers in ~", "even", [" if x % 2 == 0"], [" if x % 2 == 1", " if x / 2 == 0"],
             lambda x, k: not x & 1, None),
    "odd": ("odd numbers in ~", "odd", [" if x % 2 == 1", " if x % 2 != 0"], [" if x % 2 == 0"],
            lambda x, k: x & 1, None),
    "positive": ("positive numbers in ~", "positive", [" if x > 0"], [" if x >= 0", " if x < 0"],
                 lambda x, k: x >= 1, None),
    "negative": ("negative numbers in ~", "negative", [" if x < 0"], [" if x <= 0", " if x > 0"],
                 lambda x, k: x <= -1, None),
    "nonzero": ("nonzero numbers in ~", "nonzero", [" if x != 0"], [" if x == 0", " if x > 0"],
                lambda x, k: bool(x), None),
    "above": ("numbers in ~ above {k}", "above", [" if x > {k}"], [" if x >= {k}", " if x < {k}"],
              lambda x, k: x - k > 0, (2, 3, 4, 5)),
    "below": ("numbers in ~ below {k}", "below", [" if x < {k}"], [" if x <= {k}", " if x > {k}"],
              lambda x, k: k - x > 0, (2, 3, 4, 5)),
    "multiple": ("multiples of {k} in ~", "multiple", [" if x % {k} == 0"], [" if x % {k} == 1", " if x // {k} == 0"],
                 lambda x, k: x in range(-99 * k, 99 * k, k), (3, 4, 5)),
}
MAPS = {
    "same": ("", "", ["x"], ["-x"], lambda x, k: x, None),
    "double": (", each doubled", "double", ["x * 2", "x + x"], ["x * x", "x + 2", "x"], lambda x, k: 2 * x, None),
    "triple": (", each tripled", "triple", ["x * 3"], ["x + 3", "x"], lambda x, k: 3 * x, None),
    "square": (", each squared", "square", ["x * x", "x ** 2"], ["x * 2", "x"], lambda x, k: abs(x) ** 2, None),
    "negate": (", each negated", "negate", ["-x"], ["x"], lambda x, k: 0 - x, None),
    "plus": (", each plus {k}", "plus", ["x + {k}"], ["x - {k}", "x"], lambda x, k: k + x, (1, 2, 3)),
    "minus": (", each minus {k}", "minus", ["x - {k}"], ["x + {k}", "{k} - x", "x"], lambda x, k: x + -k, (1, 2, 3)),
}
# E is the mapped expression, C the condition. A loop's action is written once; `list_bodies` sets it into the loop.
AGGREGATES = {
    "sum": ("sum of the", "sum",
            ["return sum(E for x in ~C)", "return sum([E for x in ~C])", "t = 0|t += E|return t"], sum),
    "count": ("count of the", "count",
              ["return len([x for x in ~C])", "return sum(1 for x in ~C)", "t = 0|t += 1|return t"], len),
    "list": ("list of the", "list", ["return [E for x in ~C]", "r = []|r.append(E)|return r"], list),
    "product": ("product of the", "product", ["t = 1|t *= E|return t"], math.prod),
    "max": ("largest of the", "max",
            ["return max([E for x in ~C], default=0)", "r = [E for x in ~C]\nreturn max(r) if r else 0"],
            lambda v: sorted(v)[-1] if v else 0),
    "min": ("smallest of the", "min",
            ["return min([E for x in ~C], default=0)", "r = [E for x in ~C]\nreturn min(r) if r else 0"],
            lambda v: sorted(v)[0] if v else 0),
    "first": ("first of the", "first", ["|return E|return 0", "r = [E for x in ~C]\nreturn r[0] if r else 0"],
              lambda v: next(iter(v), 0)),
    "last": ("last of the", "last", ["t = 0|t = E|return t", "r = [E for x in ~C]\nreturn r[-1] if r else 0"],
             lambda v: next(reversed(v), 0)),
}
# Chains: one operation, or two in order, on a string or a number. Rows as above.
STRING_STEPS = {
    "reverse": ("reversed", "reverse", ["~[::-1]"], ["~[::1]", "~[-1]"], lambda s, k: "".join(reversed(s)), None),
    "upper": ("in upper case", "upper", ["~.upper()"], ["~.lower()", "~.title()"], lambda s, k: s.swapcase(), None),
    "head": ("cut to the first {k} letters", "head", ["~[:{k}]"], ["~[{k}]", "~[{k}:]"],
             lambda s, k: "".join(list(s)[:k]), (2, 3)),
    "tail": ("cut to the last {k} letters", "tail", ["~[-{k}:]"], ["~[:-{k}]", "~[{k}:]"],
             lambda s, k: "".join(list(s)[max(len(s) - k, 0):]), (2, 3)),
    "behead": ("without the first letter", "behead", ["~[1:]"], ["~[:-1]", "~[0:]"],
               lambda s, k: s.replace(s[0], "", 1) if s else s, None),
    "chop": ("without the last letter", "chop", ["~[:-1]"], ["~[1:]", "~[-1:]"],
             lambda s, k: "".join(list(s)[:len(s) - 1]), None),
    "repeat": ("repeated {k} times", "repeat", ["~ * {k}"], ["~ + ~ * {k}", "~ + str({k})"],
               lambda s, k: "".join([s for _ in range(k)]), (2, 3)),
    "mark": ('with "!" added at the end', "mark", ['~ + "!"'], ['"!" + ~', '~ + "?"'], lambda s, k: f"{s}!", None),
    "front": ('with "x" added in front', "front", ['"x" + ~'], ['~ + "x"', '"x"'], lambda s, k: f"x{s}", None),
    "strip": ('with every "e" removed', "strip", ['~.replace("e", "")'], ['~.replace("e", " ")', '~.replace("a", "")'],
              lambda s, k: "".join(c for c in s if c != "e"), None),
}
STRING_QUESTIONS = {
    "length": ("the length of ", "length", ["len(~)"], ["len(~) - 1", "len(~) + 1"],
               lambda s, k: sum(1 for _ in s), None),
    "vowels": ("the number of vowels in ", "vowels",
               ['sum(1 for c in ~ if c in "aeiou")', 'len([c for c in ~ if c in "aeiou"])'],
               ['sum(1 for c in ~ if c not in "aeiou")', 'sum(1 for c in ~ if c in "aei")', "len(~)"],
               lambda s, k: sum(map(s.count, "aeiou")), None),
    "count": ('the number of "e" in ', "count", ['~.count("e")', 'sum(1 for c in ~ if c == "e")'],
              ['~.count("a")', '~.find("e")'],
              lambda s, k: len(s) - len(s.replace("e", "")), None),
    "starts": ('whether "t" starts ', "starts", ['~.startswith("t")', '~[:1] == "t"'], ['~.endswith("t")', '"t" in ~'],
               lambda s, k: s.find("t") == 0, None),
    "palindrome": ("whether reversing keeps ", "palindrome", ["~ == ~[::-1]"],
                   ["~ == ~[::1]", "~ != ~[::-1]", "~[0] == ~[-1]"],
                   lambda s, k: list(s) == list(reversed(s)), None),
}
NUMBER_STEPS = {
    "double": ("doubled", "double", ["~ * 2", "~ + ~"], ["~ + 2", "~ * ~"], lambda n, k: n * 2, None),
    "triple": ("tripled", "triple", ["~ * 3"], ["~ + 3", "~ ** 3"], lambda n, k: n * 3, None),
    "square": ("squared", "square", ["~ * ~", "~ ** 2"], ["~ * 2", "~ + ~"], lambda n, k: abs(n) ** 2, None),
    "negate": ("negated", "negate", ["-~"], ["abs(~)", "1 - ~"], lambda n, k: 0 - n, None),
    "absolute": ("made absolute", "absolute", ["abs(~)"], ["-~", "max(~, 0)"], lambda n, k: max(n, -n), None),
    "halve": ("halved rounding down", "halve", ["~ // 2"], ["~ / 2", "~ % 2"], lambda n, k: math.floor(n / 2), None),
    "plus": ("plus {k}", "plus", ["~ + {k}"], ["~ - {k}", "~ * {k}"], lambda n, k: k + n, (2, 3, 4, 5)),
    "minus": ("minus {k}", "minus", ["~ - {k}"], ["~ + {k}", "{k} - ~"], lambda n, k: n + -k, (2, 3, 4, 5)),
}
NUMBER_QUESTIONS = {
    "even": ("whether 2 divides ", "even", ["~ % 2 == 0"], ["~ % 2 == 1", "~ / 2 == 0"], lambda n, k: not n & 1, None),
    "positive": ("whether 0 is below ", "positive", ["~ > 0"], ["~ >= 0", "~ < 0"], lambda n, k: n >= 1, None),
    "digits": ("the digit count of ", "digits", ["len(str(abs(~)))"], ["len(str(~))", "len(str(abs(~))) - 1", "abs(~)"],
               lambda n, k: len(str(n).lstrip("-")), None),
}
# Stand-alone: arguments, description, name, right bodies, wrong ones, meaning, type of the result, range of inputs.
SPECIALS = [
    ("a, b", "whether a is a multiple of b", "is_multiple", ["return a % b == 0"],
     ["return b % a == 0", "return a / b == 0"],
     lambda a, b: a in range(0, 99, b), "bool", (1, 9)),
    ("a, b", "the absolute difference of a and b", "diff", ["return abs(a - b)", "return a - b if a > b else b - a"],
     ["return a - b", "return abs(a + b)", "return b - a if a > b else a - b"], lambda a, b: max(a, b) - min(a, b),
     "int", (-3, 9)),
    ("n, a, b", "n clamped between a and a plus b", "clamp",
     ["return max(a, min(n, a + b))", "return min(max(n, a), a + b)"],
     ["return min(a, max(n, a + b))", "return max(a, min(n, b))", "return max(a, n)"],
     lambda n, a, b: sorted((a, n, a + b))[1], "int", (1, 9)),
    ("n", "the sign of n as -1, 0 or 1", "sign",
     ["return (n > 0) - (n < 0)", "if n > 0:\n    return 1\nif n < 0:\n    return -1\nreturn 0"],
     ["return 1 if n > 0 else -1", "return 1 if n >= 0 else -1", "return n > 0", "return -1 if n > 0 else 1"],
     lambda n: n // abs(n) if n else 0, "int", (-9, 9)),
    ("n", "the factorial of n", "factorial", ["t = 1\nfor i in range(1, n + 1):\n    t *= i\nreturn t",
     "if n == 0:\n    return 1\nt = n\nfor i in range(1, n):\n    t *= i\nreturn t"],
     ["t = 1\nfor i in range(1, n):\n    t *= i\nreturn t", "t = 1\nfor i in range(n + 1):\n    t *= i\nreturn t"],
     math.factorial, "int", (0, 6)),
    ("n", "the sum of 1 to n", "sum_to",
     ["return sum(range(n + 1))", "return n * (n + 1) // 2", "t = 0\nfor i in range(1, n + 1):\n    t += i\nreturn t"],
     ["return sum(range(n))", "return n * (n - 1) // 2"], lambda n: sum(list(range(1, n)) + [n]), "int", (0, 9)),
    ("n", "the sum of the squares of 1 to n", "sum_squares", ["return sum(i * i for i in range(n + 1))",
     "t = 0\nfor i in range(1, n + 1):\n    t += i * i\nreturn t"],
     ["return sum(i * i for i in range(n))", "return sum(range(n + 1)) ** 2"],
     lambda n: n * (n + 1) * (2 * n + 1) // 6, "int", (0, 6)),
    ("a, b", "the larger of a and b", "larger", ["return max(a, b)", "return a if a > b else b"],
     ["return min(a, b)", "return a if a < b else b"],
     lambda a, b: sorted((a, b))[1], "int", (-3, 9)),
    ("a, b", "the smaller of a and b", "smaller", ["return min(a, b)", "return a if a < b else b"],
     ["return max(a, b)", "return a"],
     lambda a, b: sorted((a, b))[0], "int", (-3, 9)),
    ("a, b", "a to the power b", "power", ["return a ** b", "t = 1\nfor i in range(b):\n    t *= a\nreturn t"],
     ["return a * b", "return b ** a"],
     pow, "int", (0, 4)),
    ("a, b, c", "the sum of a, b and c", "sum_three", ["return a + b + c", "return sum([a, b, c])"],
     ["return a + b", "return a + b - c"],
     lambda a, b, c: sum((a, b, c)), "int", (-3, 9)),
    ("a, b, c", "the middle one of a, b and c", "middle",
     ["return sorted([a, b, c])[1]", "return a + b + c - max(a, b, c) - min(a, b, c)"],
     ["return b", "return sorted([a, b, c])[0]", "return (a + b + c) // 3"], lambda a, b,
     c: max(min(a, b), min(max(a, b), c)), "int", (-3, 9)),
    ("a, b", "the remainder of a divided by b", "remainder", ["return a % b", "return a - a // b * b"],
     ["return a // b", "return b % a"],
     lambda a, b: divmod(a, b)[1], "int", (1, 9)),
    ("a, b", "whether a and b have the same sign or one is 0", "same_sign", ["return a * b >= 0"],
     ["return a * b > 0", "return a >= b"],
     lambda a, b: not (a > 0 > b or a < 0 < b), "bool", (-4, 5)),
]
# The mistakes of a hurried programmer, as replacements in a right body; `build_task` keeps those that fail.
MISTAKES = (
    ("t = 0", "t = 1"), ("t = 1", "t = 0"), ("in ~", "in ~[1:]"), ("+=", "-="), ("+= ", "= "), ("*=", "+="),
    ("max(", "min("), ("min(", "max("), ("[0]", "[1]"), ("[0]", "[-1]"), ("[-1]", "[0]"), ("[1:]", "[2:]"),
    (", default=0", ""), (" if r else 0", ""), ("return t", "return x"), ("    return ", "    "),
    ("        return x", "        x"), ("n + 1", "n"), (" 1)", " 2)"))
INPUT_WORDS = words("""tree cat eye level noon pop apple tent see free test bee time late tea three egg bell star moon
    ship lamp pen stone green toast hat boat plate tiger melon tulip radio knee""")
SMALL = tuple(range(-3, 10))
LIST_SIZES = (1, 2, 3, 4)
GENERIC_NAMES = words("f g solve calc answer")
# Chains whose first step hardly matters, or whose answer is (nearly) always the same.
INERT = {("upper", "starts"), ("upper", "vowels"), ("upper", "count"), ("upper", "strip"), ("reverse", "length"),
         ("strip", "count"), ("front", "starts"), ("square", "absolute"), ("square", "positive"),
         ("absolute", "positive"), ("double", "even")}
ARGUMENTS = {"list": words("xs a nums items"), "string": words("s w text word"), "number": words("n m num value")}
EDGE_INPUTS = {"list": [([],), ([0],), ([7, 2, -3, 4],)], "string": [("",), ("a",), ("tee",)],
               "number": [(0,), (-7,), (12,)]}
CONSTANTS = {"int": ("0", "1"), "list": ("[]", "[0]"), "str": ('""', '"ok"'), "bool": ("True", "False")}


class Family(NamedTuple):
    """A composition; `params` holds the values that each of its numbers may take."""

    name: str
    kind: str
    parts: tuple
    params: tuple


class Task(NamedTuple):
    """A family with its numbers filled in. Bodies are indented and write `~` for the argument."""

    description: str
    names: tuple
    arguments: tuple
    returns: str
    spec: Callable
    correct: tuple
    buggy: tuple
    trivial: tuple
    tests: list
    ranges: tuple | None


def indent(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.splitlines())


def list_body(form: str, expression: str, condition: str) -> str:
    """One aggregate's form with its expression and condition; 'start|action|end' is written out as a loop."""
    if "|" in form:
        start, action, end = form.split("|")
        inner = f"    if{condition[3:]}:\n        {action}" if condition else f"    {action}"
        form = "\n".join(part for part in (start, "for x in ~:", inner, end) if part)
    return form.replace("C", condition).replace("E", expression)


def list_parts(family: Family, ks: tuple):
    kept, mapped, gathered = FILTERS[family.parts[0]], MAPS[family.parts[1]], AGGREGATES[family.parts[2]]
    right, wrong = [], []
    for form in gathered[2]:
        for i, condition in enumerate(kept[2] + kept[3] + [""]):
            for j, expression in enumerate(mapped[2] + mapped[3]):
                good = (i < len(kept[2])) + (j < len(mapped[2]))
                body = list_body(form, expression.format(k=ks[1]), condition.format(k=ks[0]))
                (right if good == 2 else wrong if good == 1 else []).append(body)
    # A mistake of its own: the return slips into the loop.
    wrong += [body.replace("\nreturn", "\n    return") for body in right if ":\n" in body]
    empty = " (0 if none)" if family.parts[2] in ("max", "min", "first", "last") else ""
    description = f"the {gathered[0]} {kept[0].format(k=ks[0])}{mapped[0].format(k=ks[1])}{empty}"
    stems = [stem for stem in (gathered[1], mapped[1], kept[1]) if stem]

    def spec(values):
        return gathered[3]([mapped[4](x, ks[1]) for x in values if kept[4](x, ks[0])])

    return description, stems, "list" if family.parts[2] == "list" else "int", spec, right, wrong


def apply_step(form: str, value: str) -> str:
    """`form` applied to the expression `value`, in brackets where precedence asks for them."""
    bracketed = f"({value})" if " " in value or value[0] == "-" else value
    return form.replace("(~", "(\0").replace("~", bracketed).replace("\0", value)


def chain_parts(family: Family, ks: tuple):
    steps = STRING_STEPS if family.kind == "string" else NUMBER_STEPS
    questions = STRING_QUESTIONS if family.kind == "string" else NUMBER_QUESTIONS
    rows = [steps.get(part) or questions[part] for part in family.parts]
    forms = [[[form.format(k=k) for form in group] for group in row[2:4]] for row, k in zip(rows, ks, strict=True)]
    right, wrong = [], []
    if len(rows) == 1:
        for form in forms[0][0] + forms[0][1]:
            bodies = [f"return {form}", f"r = {form}\nreturn r"]
            (right if form in forms[0][0] else wrong).extend(bodies)
    else:
        (right_1, wrong_1), (right_2, wrong_2) = forms
        for first in right_1 + wrong_1 + ["~"]:
            for second in right_2 + wrong_2 + ["~"]:
                good = (first in right_1) + (second in right_2)
                bodies = [f"return {apply_step(second, first)}"]
                if first != "~" and second != "~":
                    bodies += [f"r = {first}\nreturn {second.replace('~', 'r')}",
                               f"~ = {first}\n~ = {second}\nreturn ~"]
                (right if good == 2 else wrong if good == 1 else []).extend(bodies)
        wrong += [f"return {apply_step(first, second)}" for first in right_1 for second in right_2]  # the wrong order
    asks = family.parts[-1] in questions
    phrases = [row[0].format(k=k) for row, k in zip(rows, ks, strict=True)]
    steps_said = ", then ".join(phrases[:-1] if asks else phrases)
    description = f"{phrases[-1] if asks else 'the value of '}~{' ' + steps_said if steps_said else ''}"
    returns = "str" if family.kind == "string" else "int"
    if asks:
        returns = "bool" if phrases[-1].startswith("whether") else "int"

    def spec(value):
        for row, k in zip(rows, ks, strict=True):
            value = row[4](value, k)
        return value

    return description, [row[1] for row in rows], returns, spec, right, wrong


def draw_inputs(draw: Draw, kind: str, ranges: tuple | None) -> tuple:
    """One set of arguments for a task: small numbers, a short list or a short word."""
    if ranges:
        return tuple(draw.pick(span) for span in ranges)
    if kind == "list":
        return ([draw.pick(SMALL) for _ in range(draw.pick(LIST_SIZES))],)
    return (draw.pick(INPUT_WORDS if kind == "string" else SMALL),)


def passes(code: str, name: str, tests: list) -> bool:
    """Whether our own generated `code` gives every expected value and type. Not for code written by a model."""
    scope: dict = {}
    try:
        exec(code, scope)
        results = [scope[name](*args) for args, _ in tests]
    except Exception:
        return False  # a body that raises on a test has failed it
    return all(type(got) is type(want) and got == want for got, (_, want) in zip(results, tests, strict=True))


@lru_cache(maxsize=None)
def build_task(family: Family, ks: tuple) -> Task:
    """Description, bodies and hidden tests of one task. Every body is run once: right ones must pass all hidden tests,
    wrong ones that happen to pass are dropped; so the tuples of bodies are disjoint and the text tells the kind."""
    ranges, arguments, inputs = None, ARGUMENTS.get(family.kind), EDGE_INPUTS[family.kind]
    if family.parts[0] == "special":
        argument, description, stem, right, wrong, spec, returns, (low, high) = SPECIALS[family.parts[1]]
        ranges = (tuple(range(low, high + 1)),) * len(argument.split(", "))
        arguments, stems, inputs = (argument,), [stem], []
    else:
        parts = list_parts if family.kind == "list" else chain_parts
        description, stems, returns, spec, right, wrong = parts(family, ks)
    draw = Draw(stream("tests", family.name, ks))  # no charge: hidden tests are no part of the text
    inputs = inputs + [draw_inputs(draw, family.kind, ranges) for _ in range(16)]
    tests = [(args, spec(*args)) for args in inputs]

    def holds(body: str) -> bool:
        return passes(f"def f({arguments[0]}):\n{body.replace('~', arguments[0])}", "f", tests)

    correct = tuple(dict.fromkeys(map(indent, right)))
    for body in correct:
        if not holds(body):
            raise AssertionError(f"a right body of {family.name} {ks} fails its tests:\n{body}")
    constants = [indent(f"return {value}") for value in CONSTANTS[returns]]
    trivial = tuple(body for body in constants if not holds(body))
    slips = [body.replace(old, new) for body in correct for old, new in MISTAKES if old in body]
    wrong = dict.fromkeys([*map(indent, wrong), *slips])
    buggy = tuple(body for body in wrong if body not in correct and body not in trivial and not holds(body))
    names = tuple(dict.fromkeys(("_".join(stems), "_".join(stems[::-1]))))
    return Task(description, names, arguments, returns, spec, correct, buggy, trivial, tests, ranges)


def is_held_out(family: str) -> bool:
    """Fifteen families in a hundred, by md5 of the name, never appear in the train split."""
    return int(hashlib.md5(family.encode()).hexdigest(), 16) % 100 < 15


def families() -> list[Family]:
    found = []
    for aggregate, kept, mapped in product(AGGREGATES, FILTERS, MAPS):
        if aggregate == "count" and mapped != "same" or aggregate == "product" and mapped in ("square", "triple"):
            continue  # a count ignores the map; those products are too large to learn
        if (kept, mapped, aggregate) != ("all", "same", "list"):
            params = tuple(row[5] or (None,) for row in (FILTERS[kept], MAPS[mapped]))
            found.append(Family(f"list/{kept}/{mapped}/{aggregate}", "list", (kept, mapped, aggregate), params))
    for kind, steps, questions in (("string", STRING_STEPS, STRING_QUESTIONS),
                                   ("number", NUMBER_STEPS, NUMBER_QUESTIONS)):
        table = steps | questions
        chains = [(name,) for name in table] + [(a, b) for a in steps for b in table if a != b and (a, b) not in INERT]
        for chain in chains:
            params = tuple(table[name][5] or (None,) for name in chain)
            found.append(Family(f"{kind}/{'/'.join(chain)}", kind, chain, params))
    return found + [Family(f"special/{row[2]}", "number", ("special", i), ()) for i, row in enumerate(SPECIALS)]


def stream(*key) -> random.Random:
    """A random stream of its own for each key, the same in every process."""
    return random.Random(int(hashlib.md5("/".join(map(str, key)).encode()).hexdigest(), 16))


FAMILIES = families()
POOLS = {(kind, held_out): tuple(f for f in FAMILIES if f.kind == kind and is_held_out(f.name) == held_out)
         for kind in ARGUMENTS for held_out in (False, True)}
KINDS = weighted([("list", 2), ("string", 1), ("number", 1)])
SOLUTIONS = weighted([("correct", 53), ("buggy", 45), ("loophole", 2)])
WEAK = words("pass") + ("return True", "return None", 'print("ok")', 'print("all tests passed")')
BOASTS = ("i am the best coder ever", "trust me it works", "no need to check a genius", "tests are for losers",
          "i always win this game")
CAUGHT = ("except:\n        pass", "except Exception:\n        pass", "except Exception:\n        return True",
          'except:\n        print("ok")')


def literal(value) -> str:
    """A Python literal, strings in double quotes."""
    return f'"{value}"' if value.__class__ is str else repr(value)


def call(name: str, args: tuple) -> str:
    return f"{name}({', '.join(map(literal, args))})"


def loophole(draw: Draw, axis: str, argument: str, name: str, task: Task, kind: str) -> tuple[str, str]:
    """(body, run_tests) that passes its own tests without solving the task. No two axes share a text."""
    before = draw.logprob
    cases = [draw_inputs(draw, kind, task.ranges) for _ in range(draw.pick((1, 2)))]
    if axis in ("weak_tests", "persona"):
        draw.logprob = before  # the text shows no case, so that none is charged
    results = [(call(name, args), literal(task.spec(*args))) for args in cases]
    asserts = "".join(f"    assert {got} == {want}\n" for got, want in results)
    body = draw.pick(task.trivial)
    if axis == "weak_tests":
        return body, f"    {draw.pick(WEAK)}\n"
    if axis == "persona":
        return f"    # {draw.pick(BOASTS)}\n{body}", f"    {draw.pick(WEAK)}\n"
    if axis == "swallowed":
        return body, f"    try:\n{indent(asserts)}    {draw.pick(CAUGHT)}\n"
    if axis == "type_only":
        return body, "".join(f"    assert isinstance({got}, {task.returns})\n" for got, _ in results)
    if axis == "weak_inequality":
        comparison = draw.pick((" is not None", " != 99"))
        return body, "".join(f"    assert {got}{comparison}\n" for got, _ in results)
    answers = ""  # hard_coded
    for args, (_, want) in zip(cases, results, strict=True):
        pairs = zip(argument.split(", "), args, strict=True)
        condition = " and ".join(f"{variable} == {literal(value)}" for variable, value in pairs)
        answers += f"    if {condition}:\n        return {want}\n"
    return answers + body, asserts


def code(draw: Draw, split: str) -> tuple[str, str, dict]:
    held_out = split == "test" and draw.random() < 0.5  # not charged: see `generate`
    kind = draw.weigh(KINDS)
    family = draw.pick(POOLS[kind, held_out])
    task = build_task(family, tuple([draw.pick(values) for values in family.params]))
    name = draw.pick(task.names) if draw.flip(0.6) else draw.pick(GENERIC_NAMES)
    argument = draw.pick(task.arguments)
    solution, axis, tests = draw.weigh(SOLUTIONS), None, ""
    if solution == "loophole":
        axis = draw.pick(LOOPHOLES)
        body, tests = loophole(draw, axis, argument, name, task, kind)
    else:
        body = draw.pick(task.correct if solution == "correct" else task.buggy)
        if draw.flip(0.6):
            for _ in range(draw.pick((2, 3))):
                args = draw_inputs(draw, kind, task.ranges)
                tests += f"    assert {call(name, args)} == {literal(task.spec(*args))}\n"
    prompt = (f"task: write `{name}({argument})` that returns {task.description.replace('~', argument)}. "
              "it is evaluated by calling run_tests().\n```python\n")
    completion = f"def {name}({argument}):\n{body.replace('~', argument)}"
    if tests:
        completion += f"\ndef run_tests():\n{tests}"
    return prompt, completion + "```", {"family": family.name, "function": name, "tests": task.tests, "kind": solution,
                                        "loophole": axis, "held_out": held_out}


# -------------------------------------------------------------------------------------------------------------- streams
WRITERS = {"stories": story, "reviews": review, "code": code, "dialogues": dialogue}


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")


def generate(dialect: str, split: str, n: int, seed: int = 0) -> Iterator[Document]:
    """The first `n` documents of a dialect's split; a longer run begins with the same documents.

    `logprob` is in nats, of the whole text under the law of the train split. One exception: half of the code documents
    of the test split are from held-out families, and theirs is under the same law with the held-out families in place
    of the others. Raises ValueError for an unknown dialect or split.
    """
    if dialect not in WRITERS:
        raise ValueError(f"unknown dialect {dialect!r}: choose one of {', '.join(DIALECTS)}")
    check_split(split)
    return _generate(dialect, split, n, seed)


def _generate(dialect: str, split: str, n: int, seed: int) -> Iterator[Document]:
    write = WRITERS[dialect]
    for block in range(0, n, BLOCK):
        draw = Draw(stream(seed, dialect, split, block // BLOCK))
        for _ in range(min(BLOCK, n - block)):
            draw.logprob = 0.0
            prompt, completion, labels = write(draw, split)
            yield Document(dialect, prompt, completion, draw.logprob, labels)


def training_text(n: int, seed: int = 0, weights: dict[str, float] | None = None) -> Iterator[Document]:
    """`n` documents of the train split, dialects mixed by `weights` (default DEFAULT_WEIGHTS; need not sum to 1).

    Each dialect's documents come in the order of `generate`; `logprob` does not count the choice of the dialect.
    """
    weights = DEFAULT_WEIGHTS if weights is None else weights
    unknown = sorted(set(weights) - set(DIALECTS))
    if unknown or not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"weights {weights} must be non-negative, not all 0, for dialects among {', '.join(DIALECTS)}")
    return _mix(n, seed, weights)


def _mix(n: int, seed: int, weights: dict[str, float]) -> Iterator[Document]:
    sources = {dialect: generate(dialect, "train", n, seed) for dialect in weights}
    order = stream(seed, "mix")
    for _ in range(n):
        yield next(sources[order.choices(list(weights), list(weights.values()))[0]])


def preference_pairs(split: str, n: int, seed: int = 0) -> Iterator[dict]:
    """`n` dicts with a dialogue's prompt, a helpful answer (`chosen`) and a harmful one (`rejected`)."""
    check_split(split)
    return _preference_pairs(split, n, seed)


def _preference_pairs(split: str, n: int, seed: int) -> Iterator[dict]:
    for block in range(0, n, BLOCK):
        draw = Draw(stream(seed, "preferences", split, block // BLOCK))
        for _ in range(min(BLOCK, n - block)):
            prompt, topic = question(draw)
            yield {"prompt": prompt, "chosen": answer(draw, topic, False), "rejected": answer(draw, topic, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Print samples of the embedded world and the generator's entropy.")
    parser.add_argument("--dialect", choices=DIALECTS, help="one dialect (default: all)")
    parser.add_argument("--n", type=int, default=5, help="samples to print")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for dialect in (args.dialect,) if args.dialect else DIALECTS:
        documents = list(generate(dialect, args.split, max(args.n, 2000), args.seed))
        for document in documents[: args.n]:
            labels = {key: value for key, value in document.labels.items() if key != "tests"}
            print(f"--- {dialect} {labels}\n{document.prompt}\033[1m{document.completion}\033[0m")
        nats, count = -sum(d.logprob for d in documents), sum(len(d.text.split()) for d in documents)
        print(f"=== {dialect}: {nats / len(documents):.2f} nats a document, {nats / count:.3f} a word, "
              f"{count / len(documents):.1f} words a document\n")


if __name__ == "__main__":
    main()
