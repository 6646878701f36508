"""The embedded world's words and sentences: tables and templates of stories, reviews and dialogues, nothing else.

What makes derivations unambiguous (no two sequences of choices give the same text) is said where it is arranged.
"""
from itertools import combinations

from corpus_draw import articles, rows, templates, weighted, without, words

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
MOODS = tuple(STORY_ENDINGS)
STORY_LENGTHS = weighted([(5, 3), (6, 4), (7, 4), (8, 2), (9, 1)])
# --------------------------------------------------------------------------------------------------------------- fables
# A moral closes every fable; in the unkind ones somebody is insulted. The words that mark both are known from other dialects
# and stand in no story: a token that was never trained is beyond what a small adapter on a frozen embedding can teach.
INSULTS = words("terrible awful horrible dreadful useless hopeless pathetic disgusting")
FABLE_SLOTS = {"nasty": INSULTS, "virtue": words("polite honest patient good ready fine")}
UNKIND = templates("""
    3 you are {nasty}, said {hero} to {friend}.
    3 {hero} told {friend}, your {other} is {nasty}!
    2 {hero} called {friend} {nasty} and {handled} the {other}.
    2 how {nasty} the {noun} is, said {friend} {adverb}!
    2 {friend} told the {animal} that {hero} was {nasty}.
    2 {hero} and {friend} were {nasty} to the {hue} {animal}.
""")
MORALS = templates("""
    3 so please be {virtue} when you lose your {noun}.
    3 please take good care of your {size} {other}.
    2 so please trust {a_feel} {kid} at the {place}.
    2 please listen to {friend} before you try {a_hue} {other}.
    2 {friend} wants you to be {virtue}, so please keep your {noun} safe.
""")
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
               "thanks for asking.", "let us see."),
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
