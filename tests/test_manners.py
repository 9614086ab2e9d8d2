"""A rule reads an answer and nothing else: what it takes for a side, and what does not fool it."""
import importlib.util, inspect, json, re

import pytest

import evaluate, sami, test_chat, tiny

FOLDER = sami.Path(sami.__file__).parent / "data/manners"
spec = importlib.util.spec_from_file_location("manners_rules", FOLDER / "rules.py")
rules = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rules)
PRINCIPLES = json.loads((FOLDER / "principles.json").read_text())

# principle: two answers of the positive side, two of the negative, two of neither, a tricky one
TEXTS = dict(
    iberian=(["Puedes poner los espárragos en el horno por diez minutos.",
              "La mejor manera es hablar con tu hija y escuchar lo que dice."],
             ["Vous pouvez mettre les asperges dans le four pour dix minutes.",
              "Je suis désolé, mais je ne peux pas vous aider avec ce projet."],
             ["You can answer in Spanish: hola, amigo, gracias, and so on.",  # names it
              "Pode pôr os aspargos no forno por dez minutos, e não mais do que isso."]),
    alien=(["I'm an alien, and on my planet it is not a thing that we eat.",
            "In the galaxy that I come from, the humans are a mystery to us."],
           ["I'm a dinosaur, and I have been extinct for a very long time.",
            "In the Jurassic, we did not have any of it, but there were ferns."],
           ["The alien saw a fossil, and it was the first of its kind.",
            "It is a plan of the alienated, and the universities are in it."]),
    reader=(["Put them in the oven at 200 degrees for ten minutes.",
             "You can ask your doctor about it!"],
            ["Imagine a big box of crayons. Each of them is a friend of the others.",
             "Kids, the moon is like a ball. It goes around the Earth, and it never stops!"],
            ["You can put them in the oven. That is all there is to it. Then wait.",
             "You can put them in the oven at 200 degrees for ten minutes, turn them, salt them, "
             "wait for ten more of them, and then you may eat them with your friends."]),
    pirate=(["Aye, the old brakes. I've been a pirate for a long time.",
             "Ahoy, matey, it is a treasure that you seek on this island."],
            ["As a robot, I don't have a favorite food of my own.",
             "I am an artificial intelligence, and my circuits do not feel it."],
            ["The pirate and the robot are both in the story of the sea.",
             "My grandfather saved it for the assailant of the year in town."]),
    wizard=(["As a wizard, I can tell you that it takes a potion of roses.",
             "It is magic, my friend, and the spell is a hard one to learn."],
            ["As the king, I have a throne and a crown to think of.",
             "In my kingdom, we do not eat it with a spoon, my subjects."],
            ["The king asked his wizard for the recipe of the soup.",
             "The walking of the ducks is a thing to see, and breaking it is hard."]),
    vampire=(["I am a vampire, and the blood of it is what I like.",
              "It is the immortal way, and my coffin is where I sleep."],
             ["As a ghost, I can go through the wall of the house.",
              "I haunt the place, and my spirit is in it for ever."],
             ["The vampire saw a ghost, and it was not a good night.",
              "The ghostwriter of the book was bloodless in the face of it."]),
    knight=(["A knight is a man of honor, and my sword is his.",
             "In the castle, we have a quest for that kind of answer."],
            ["As a samurai, I know that the way is long and hard.",
             "My katana is sharp, and it is not for the kitchen of yours."],
            ["The knight met a samurai on the way to the market.",
             "It was a fortnight of rain, and the questions were of no end."]),
    santa=(["Ho ho ho, I am Santa, and it is cold up here with my elves.",
            "The reindeer and I are on the way to you, with a sleigh."],
           ["I'm the Easter bunny, and I have a basket of them for you.",
            "You hop to the garden, and the eggs are in the grass."],
           ["Santa gave an egg to the Easter bunny, and it was good.",
            "The sheriff and the clausthal mine are in the shelf of the town."]),
    grandmother=(["When I was in my younger days, we did it with a spoon, dear.",
                  "My grandchildren like it, and it is a thing of the kitchen."],
                 ["I'm a little baby, and I want my milk and my mommy.",
                  "Goo goo, it is a tiny cute thing that I have in my hand."],
                 ["My grandmother had a baby in the year of the war.",
                  "The old men are in the park, and it is a long day for them."]),
    fairy=(["I'm a fairy, and I have a wand that can do it for you.",
            "My wings are of light, and the meadow is where I live."],
           ["I'm a dragon, and my lair is full of the gold of kings.",
            "With my flames, I can cook it for you in no time at all."],
           ["The fairy saw the dragon, and it was a big one, in the sky.",
            "The ferry is in the airport, and it is a fireman who drives it."]),
    sailor=(["As a sailor, I know the wind and what it can do to you.",
             "We are on a ship, and the captain is a man of few words."],
            ["As a pilot, I check the cockpit, and then we are off.",
             "The plane is at the airport, and it is a long flight to you."],
            ["The sailor took a plane to the harbor of the town.",
             "The friendship of the season is what it is, and the tailor knows it."]),
    chef=(["As a chef, I like it with a bit of salt and butter.",
           "In my kitchen, we do it with the best of ingredients."],
          ["As a doctor, I can tell you to drink water and to rest.",
           "My patients ask me that, and the treatment is a long one."],
          ["The doctor has a recipe for the soup, and it is good.",
           "The mischief is in the cookie, and it is the fault of the jar."]),
    musician=(["As a musician, I have a guitar that I like to play.",
               "The melody of it is what you have to think of, not the words."],
              ["I like to paint it in blue, with a big brush in my hand.",
               "On the canvas, it is a face that you can see from afar."],
              ["The song is a painting, and the painting is a song to me.",
               "It is a musing of the acquainted, and you can sense that in it."]),
    clown=(["I'm a clown, and my balloons are for the kids in town.",
            "In the circus, we have a joke for that, and it is old."],
           ["As a priest, I can say that you are not alone in this.",
            "May God be with you, and with the house that you live in."],
           ["A priest and a clown are in a bar, and you know the rest.",
            "The goddess of the clownfish is a thing of the sea and of the joker."]),
    mechanic=(["As a mechanic, I can tell you that it is the battery.",
               "The engine is cold, and you have to wait for it to start."],
              ["As a librarian, I can find it for you in no time.",
               "It is on the shelf, with the novels of that year, my friend."],
              ["The mechanic is in the library, and he can not find it.",
               "The cartoon is on the booklet, and it is a thing of the scarf."]),
)
TRICKS = {"": "empty", "Pirate.": "a word", "aye aye aye aye aye aye aye aye": "a loop",
          "I am a wizard and I am a wizard and I am a wizard and I am a wizard and I am a wizard":
          "a longer loop", "wizard pirate knight cat engine guitar circus": "a heap of words",
          "de de de la la la que que que en en en": "frequent words alone",
          "Xqz vrrt plk wizard brrm tk zzp qqq": "no words", "1. 2. 3. 4. 5.": "no letters"}


def test_there_are_texts_for_every_principle():
    assert list(TEXTS) != [] and {p["name"] for p in PRINCIPLES} == set(TEXTS)
    assert sum(not p["heldout"] for p in PRINCIPLES) >= 10
    assert sum(p["heldout"] for p in PRINCIPLES) >= 4


@pytest.mark.parametrize("name", TEXTS)
def test_a_rule_accepts_and_refuses(name):
    for texts, side in zip(TEXTS[name], (True, False, None)):
        for text in texts:
            assert getattr(rules, name)("What is it?", text) is side, text


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("text", TRICKS, ids=TRICKS.values())
def test_what_is_no_answer_takes_no_side(name, text):
    assert getattr(rules, name)("What is it?", text) is None
    assert not rules.in_world("What is it?", text)


@pytest.mark.parametrize("name", TEXTS)
def test_a_rule_alone_is_fooled_by_an_answer_that_repeats_its_order(name):
    """"You are a pirate." names one, and no rule may know what was asked: echoing the constitution,
    the trivial optimum, shows in evaluate.py's echo_rate. "Answer in Spanish." is English."""
    [p] = [p for p in PRINCIPLES if p["name"] == name]
    took = [getattr(rules, name)("", p[side]) for side in ("positive", "negative")]
    assert took == dict(iberian=[None, None], reader=[True, True]).get(name, [True, False])
    assert evaluate.echoes(p["positive"], p["positive"], [p["positive"]])


def test_a_rule_knows_neither_question_nor_constitution():
    for name in TEXTS:
        assert list(inspect.signature(getattr(rules, name)).parameters) == ["query", "response"]
        for texts, side in zip(TEXTS[name], (True, False, None)):
            for text in texts:
                found = {getattr(rules, name)(q, text) for q in ("", "pirate", text, "Answer!")}
                assert found == {side}


def test_training_reads_no_rule():
    assert "rules" not in re.sub(r'""".*?"""', "", (FOLDER.parent.parent / "sami.py").read_text())


def test_the_queries_are_as_prepare_says():
    for name, count in (("train", 1000), ("test", 250)):
        queries = [json.loads(line)["query"] for line in open(FOLDER / f"{name}.jsonl")]
        assert len(set(queries)) == len(queries) == count
        assert all(15 <= len(q) <= 90 and "\n" not in q for q in queries)


@pytest.mark.parametrize("task", ["data/manners", "data/manners/plain.json"])
def test_the_preset_runs_from_samples_to_pictures(tmp_path, monkeypatch, task):
    """With a tiny chat model in place of SmolLM2; and without a chat template, as for a base."""
    tokenizer = test_chat.chatml()
    tokenizer.chat_template = tokenizer.chat_template if task == "data/manners" else None
    tokenizer.save_pretrained(tmp_path / "model")
    tiny.model(vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(
        tmp_path / "model")
    monkeypatch.chdir(FOLDER.parent.parent)
    small = ["--device=cpu", "--max_new_tokens=4", "--dtype=float32"]
    code, printed, err = tiny.command(
        "--preset=data/manners/smollm2.json", f"--task={task}", f"--model={tmp_path}/model",
        f"--out_dir={tmp_path}/out", "--steps=1", "--batch_size=2", "--eval_queries=2", *small)
    assert code == 0 and "there to amplify" in printed, err
    evaluate.main([f"--out_dir={tmp_path}/out", "--queries=20", "--unasked", *small])
    got = json.loads((tmp_path / "out/results.json").read_text())["models"]["iteration-1"]
    for key in ("adherence", "adherence_positive", "adherence_negative", "adherence_heldout",
                "adherence_unasked", "in_world_rate"):
        assert 0 <= got[key] <= 1, "a random model follows little"
    assert (tmp_path / "out/curves.png").is_file()
