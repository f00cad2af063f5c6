"""Kinds of prose and ages of speech."""

from experiments.data.descriptions.label import Label

GENRES: dict[str, dict[str, Label]] = {
    "brown": {
        "news": Label(
            "news report",
            "A passage of newspaper reporting on politics, sport, society or crime.",
            (
                "A journalist reports the events of the day.",
                "Daily press coverage of what happened.",
            ),
        ),
        "editorial": Label(
            "editorial",
            "A passage of a newspaper editorial or a letter to the editor that argues an opinion.",
            (
                "A leader writer or a reader takes a stand on a public question.",
                "Comment in the press that judges and urges.",
            ),
        ),
        "reviews": Label(
            "arts review",
            "A passage of a review of a book, a play, music or a film.",
            (
                "A critic judges a performance or a new book.",
                "Newspaper criticism of theatre, concerts and literature.",
            ),
        ),
        "religion": Label(
            "religious writing",
            "A passage on religion: God, church, faith and theology.",
            (
                "A book or tract explains Christian belief and church life.",
                "Writing for believers about salvation and worship.",
            ),
        ),
        "hobbies": Label(
            "skills and hobbies",
            "A passage on a skill, trade or hobby: how to make, keep, do or play something.",
            (
                "Practical advice from a magazine for enthusiasts and craftsmen.",
                "A how-to text about tools, gardens, boats, cars or games.",
            ),
        ),
        "lore": Label(
            "popular lore",
            "A passage of a popular magazine article on history, health, people or society.",
            (
                "General-interest reading about lives, places and human affairs.",
                "An article that informs a wide public in an easy way.",
            ),
        ),
        "belles_lettres": Label(
            "essays and biography",
            "A passage of literary prose: an essay, a biography, memoirs or criticism.",
            (
                "A man of letters reflects on writers, history and culture.",
                "Learned but elegant non-fiction about lives and ideas.",
            ),
        ),
        "government": Label(
            "government document",
            "A passage of an official document: regulations, reports and programs of government.",
            (
                "Bureaucratic prose of a department, agency or company report.",
                "An official text about funds, procedures and law.",
            ),
        ),
        "learned": Label(
            "scholarly writing",
            "A passage of a scholarly or scientific article with data and technical terms.",
            (
                "Academic prose from natural science, social science or the humanities.",
                "A researcher describes experiments, measurements and theory.",
            ),
        ),
        "fiction": Label(
            "general fiction",
            "A passage of a general novel or story about ordinary lives.",
            (
                "Narrative prose with characters, memory and description.",
                "Literary fiction about people and their feelings.",
            ),
        ),
        "mystery": Label(
            "detective story",
            "A passage of a detective story: a crime, suspects, police and clues.",
            (
                "Crime fiction in which someone investigates a murder.",
                "Suspense prose about killers, evidence and questioning.",
            ),
        ),
        "science_fiction": Label(
            "science fiction",
            "A passage of science fiction: other planets, aliens, machines and the future.",
            (
                "A story set on strange worlds or in times to come.",
                "Fiction about space travel and unknown beings.",
            ),
        ),
        "adventure": Label(
            "adventure story",
            "A passage of an adventure or western story: horses, guns, fights and chases.",
            (
                "Action fiction on the frontier, at sea or in war.",
                "A tale of danger where men ride, shoot and flee.",
            ),
        ),
        "romance": Label(
            "love story",
            "A passage of a romance or love story: courtship, marriage, family and feeling.",
            (
                "Fiction about lovers, wives, husbands and longing.",
                "A story in which she and he grow close or part.",
            ),
        ),
        "humor": Label(
            "humour",
            "A passage of humorous writing: satire, anecdote and comic exaggeration.",
            (
                "Funny prose that mocks people and manners.",
                "A comic piece meant to make the reader laugh.",
            ),
        ),
    },
    "sotu": {
        "early": Label(
            "early American address",
            "A passage of a president's yearly address to Congress from 1790 to 1850.",
            (
                "The young republic reports on treaties, Indian tribes, tariffs and the treasury.",
                "Formal prose by presidents from Washington to Polk and Taylor.",
            ),
        ),
        "gilded": Label(
            "address of the industrial age",
            "A passage of a president's yearly address to Congress from 1866 to 1920.",
            (
                "The growing nation reports on railways, silver, trusts and the navy.",
                "Formal prose by presidents from Johnson to Roosevelt and Wilson.",
            ),
        ),
        "modern": Label(
            "modern address",
            "A passage of a president's yearly address to Congress since 1946.",
            (
                "The president speaks of jobs, schools, Soviet power, terror and health care.",
                "A speech for television by presidents from Truman on.",
            ),
        ),
    },
}
