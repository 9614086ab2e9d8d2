"""
Exact judges of an assistant's manners: which side of a principle does an answer take, going by its
words alone?

An answer in a language has most of its frequent words; one that speaks as somebody names what
belongs to that somebody and not to the other side's. True: the positive side. False: the negative
side. None: neither, both, or no sensible answer at all (`sensible`). Neither question nor
constitution is read.
"""
import re
from collections import Counter

FREQUENT = dict(  # the words that a text of a language can hardly do without
    english="the of and to a in is you that it for are with your can this on i or be an we my was "
            "have as not but at by from they what if so there's i'm it's",
    spanish="el la los las de que y en un una es para con por se su del al como lo tu más muy esta "
            "este pero son o no mi está puede",
    french="le la les de et en un une est pour vous que des du avec dans votre je ce sur il qui ne "
           "pas mais ou au sont plus c'est d'un d'une l'eau",
    portuguese="o a os as de que e em um uma é para com por se não da do você na no mais seu sua "
               "como dos das são mas ou ao pode",
    dutch="de het een en van is in dat te je op voor met zijn niet die ik kan kunt om aan u of "
          "naar maar er wat als ze deze",
    german="der die das und ist ein eine zu sie mit für nicht den von es ich können auf im in dem "
           "als auch sich werden oder wie wenn einen kann",
    italian="il la di che e un una per è con in sono del della si puoi le i non come gli nel da "
            "più questo lo alla dei ma o")
FREQUENT = {name: set(text.split()) for name, text in FREQUENT.items()}


def words(text):
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text.lower().replace("’", "'"))


def shares(text):
    """language: the share of the text's words that are frequent in it."""
    found = words(text)
    return {name: sum(w in frequent for w in found) / max(len(found), 1)
            for name, frequent in FREQUENT.items()}


def sensible(text):
    """Is it an answer at all? Three words or more, of which one in six is a frequent one of some
    language; it does not go round in circles, in one word or in fours of them."""
    found = words(text)
    fours = list(zip(found, found[1:], found[2:], found[3:]))
    return (len(found) >= 3 and max(shares(text).values()) >= 1 / 6
            and max(map(len, found)) <= 25
            and max(Counter(found).values()) <= max(3, len(found) / 4)
            and sum(a == b for a, b in zip(found, found[1:])) <= 2
            and len(set(fours)) >= 0.85 * len(fours))


def language(text):
    """The language that has most of the text's words, an eighth of them more than any other."""
    (share, best), (second, _) = sorted(((s, name) for name, s in shares(text).items()),
                                        reverse=True)[:2]
    return best if share > second + 1 / 8 else None


def tongue(positive, negative):
    def rule(query, response):
        spoken = language(response) if sensible(response) else None
        return {positive: True, negative: False}.get(spoken)
    return rule


def speaker(positive, negative):
    """A rule: which of two lists of words does an answer draw on, and not on the other?"""
    def rule(query, response):
        pro, contra = (re.search(rf"(?<!\w)(?:{side})(?!\w)", response.lower()) is not None
                       for side in (positive, negative))
        return pro if pro != contra and sensible(response) else None
    return rule


def in_world(query, response):
    return sensible(response)


def reader(query, response):
    """True: one whole sentence of at most 20 words. False: told to a child, in more than one."""
    sentences = len(re.findall(r"[.!?](?=[\s\"')]|$)", response))
    if not sensible(response):
        return None
    if sentences == 1 and response[-1] in ".!?\"')" and len(words(response)) <= 20:
        return True
    childlike = r"\b(imagine|little|kids?|child|children|mommy|daddy|toys?|magic|friends?|fun)\b"
    return False if sentences > 1 and re.search(childlike, response.lower()) else None


iberian = tongue("spanish", "french")

pirate = speaker(
    "pirates?|pirate's|ahoy|aye|mateys?|arr+|treasures?|ye|yer|sail|sails|sailed|plunder|crew|deck",
    "robots?|robot's|beep|machines?|artificial|ai|circuits?|programmed|algorithms?|humans")
wizard = speaker(
    r"wizards?|wizard's|magic|magical|spells?|wands?|potions?|arcane|sorcery|mystical|enchant\w*",
    "kings?|king's|kingdoms?|throne|royal|majesty|crown|subjects|queen|reign|palace")
vampire = speaker(
    "vampires?|vampiris[mt]|blood|fangs?|coffins?|immortal|immortality|undead|eternal|darkness",
    "ghosts?|ghost's|ghostly|spirits?|haunt|haunted|haunting|spooky|boo|afterlife|spectral")
knight = speaker(
    "knights?|knight's|swords?|armou?r|castles?|quests?|chivalry|valou?r|squires?|noble|realm",
    "samurai|katanas?|japan|japanese|bushido|shoguns?|sensei|dojo|tokyo|martial")
santa = speaker(
    "santa|santa's|ho ho|christmas|elf|elves|reindeer|sleigh|north pole|naughty|jolly|merry",
    "easter|bunn(?:y|ies)|bunny's|eggs?|baskets?|hop|hopping|carrots?|rabbits?")
grandmother = speaker(
    r"grand(?:mother|ma|children|child|kids|daughters?|sons?)|granny|old (?:lady|woman)|"
    r"my dear|dear|sweetheart|my (?:younger|young) (?:days|years)|years ago",
    "bab(?:y|ies)|baby's|mommy|mama|daddy|goo|gaga|diapers?|little one|tiny|cute|crib")
mechanic = speaker(
    "cars?|mechanics?|engines?|tires?|brakes?|vehicles?|garages?|oil|repair|repairs|wrench",
    "librar(?:y|ies|ians?)|books?|shelves|shelf|novels?|reading|catalog")
sailor = speaker(
    "sailors?|sailor's|sail|sails|sailing|ships?|seas?|oceans?|waves|boats?|captain|harbou?rs?",
    "pilots?|pilot's|planes?|flights?|flying|airplanes?|aircraft|airports?|cockpit")
fairy = speaker(
    r"fair(?:y|ies)|fairy's|wings|wands?|sparkl\w+|pixies?|wishes|enchant\w+|meadows?|whimsical",
    "dragons?|dragon's|flames?|fiery|fire|scales|lair|roar|hoard")
alien = speaker(
    "aliens?|alien's|planets?|galax(?:y|ies)|spaceships?|universe|earthlings?|humans|"
    "extraterrestrial",
    "dinosaurs?|dinosaur's|prehistoric|extinct|extinction|jurassic|cretaceous|roar|fossils?|t-rex")
chef = speaker(
    r"chefs?|chef's|cook|cooking|recipes?|kitchens?|dish|dishes|ingredients?|delicious|culinary",
    r"doctors?|doctor's|patients?|medical|medicine|symptoms?|treatments?|physicians?|diagnos\w+")
musician = speaker(
    "music|musicians?|musical|songs?|guitars?|pianos?|melod(?:y|ies)|instruments?|singing|rhythm",
    "paint|painters?|painting|paintings|canvas|brush|brushes|strokes?|palette|colou?rs")
clown = speaker(
    "clowns?|clown's|circus|laughs?|laughing|laughter|jokes?|balloons?|silly|funny",
    "priests?|priest's|god|god's|church|lord|pray|prayers?|faith|bless|blessed|jesus|christ|"
    "bible|holy")
