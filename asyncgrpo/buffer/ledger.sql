-- What became of every training lease; see ledger.py.
CREATE TABLE leases (           -- every training lease as it is now
    ticket INTEGER PRIMARY KEY, -- its number; evaluations use up numbers, too
    lease_id TEXT NOT NULL,     -- as in trajectories and logs
    position INTEGER NOT NULL,  -- of its prompt in the training stream
    epoch INTEGER,              -- of the data; null: generated tasks
    prompt_id TEXT NOT NULL,
    data_source TEXT NOT NULL,
    peer TEXT NOT NULL,         -- who got it: actor.process
    version INTEGER NOT NULL,   -- policy version that the actor held then
    life INTEGER NOT NULL,      -- of the buffer, see lives
    state TEXT NOT NULL,        -- open, stored, taken, trained, filtered, expired, failed, evicted
    reason TEXT NOT NULL DEFAULT '',
    step INTEGER,               -- whose batch took it
    again INTEGER NOT NULL DEFAULT 0, -- 1: it brought no group and its prompt goes out again
    leased_at REAL NOT NULL,    -- all times in seconds since 1970
    arrived_at REAL,
    taken_at REAL,
    ended_at REAL,
    num_completions INTEGER,    -- of its group; null: none came
    num_tokens INTEGER,         -- of all completions
    reward_mean REAL,
    oldest_version INTEGER,     -- policy versions that sampled its tokens
    newest_version INTEGER
);
CREATE INDEX leases_on_the_way ON leases (state) WHERE state IN ('open', 'stored', 'taken');
CREATE INDEX leases_to_repeat ON leases (position) WHERE again = 1;
CREATE TABLE changes (          -- every change of a lease's state, in order; never altered
    seq INTEGER PRIMARY KEY,
    ticket INTEGER NOT NULL,
    state TEXT NOT NULL,        -- or returned: a learner began before the step that trained it
    reason TEXT NOT NULL,
    step INTEGER,
    time REAL NOT NULL
);
CREATE TABLE steps (            -- every batch
    step INTEGER PRIMARY KEY,
    formed_at REAL NOT NULL,
    trained_at REAL,            -- null: not yet, or it is made once more
    tickets TEXT NOT NULL,      -- JSON list in the batch's order; see batches
    num_new INTEGER NOT NULL    -- of the tickets; the others were trained before (replay_ratio)
);
CREATE VIEW batches AS          -- the leases of each step; is_new: not trained before
    SELECT step, trained_at, key AS place, value AS ticket, key < num_new AS is_new
    FROM steps, json_each(tickets);
CREATE TABLE payloads (         -- groups that a restart needs
    arrival INTEGER PRIMARY KEY,
    ticket INTEGER NOT NULL UNIQUE,
    frame BLOB NOT NULL,        -- see wire/codec.py
    checksum INTEGER NOT NULL   -- of the frame
);
CREATE TABLE evaluations (
    version INTEGER NOT NULL,
    name TEXT NOT NULL,         -- of the block
    last_number INTEGER NOT NULL, -- of any lease when it began
    report TEXT,                -- JSON; null: not done
    is_lost INTEGER NOT NULL DEFAULT 0, -- 1: of a policy that a roll-back took away
    PRIMARY KEY (version, name)
);
CREATE TABLE lives (            -- every start of the buffer process
    life INTEGER PRIMARY KEY,
    started_at REAL NOT NULL
);
