"""
How the ranks of a group agree on one verdict, over a store and nothing else of torch.

Read in this order, each module importing only from those before it:

* ``process``: which process a rank is, where it is, what the system says of it
* ``text``, ``records``: what a rank tells, and what all ranks are told
* ``rounds``: paths of scopes, the count of a round, and `judge`, as pure functions
* ``wire``: how a verdict travels
* ``store_thread``: store calls that can be bounded and left behind
* ``life``: how a rank joins its group, and leaves it
* ``wait``, ``peers``: one wait; what a rank knows of its peers, and tells them
* ``part``: one rank's part in the rounds of its group: arrive, decide
* ``stacks``, ``locate``: where the ranks are
* ``losses``: which of them are gone
* ``revocation``: free a rank that is stuck because a peer failed
* ``watch``: what has to be looked for while a scope lasts
* ``control``: the one thread of a process that looks, answers and warns
* ``barrier``: what the scope calls: arrive, and wait with a bound

Nothing here imports from the package around it, and nothing here speaks to people: facts are
returned, or handed to a function that the scope gave.

Keys, below ``collective_scope/`` at the root of the store, except for ``life of {n}``, which is in the
group's own part of it:

=================  ===========================================  ==========================================
key                who writes it, and when                      when it goes
=================  ===========================================  ==========================================
life of {n}        the first rank that joins: a random word     with the last rank that leaves the group
                   that begins all keys of the group; a rank
                   that leaves counts itself behind it
{life}/rank/{r}    rank *r*: the latest `Record`                with the last rank that leaves the group
{life}/{round}/n   each rank adds to it when it arrives, or     when the next round is complete
                   has a failure to tell
{life}/{round}/v   the verdict; the first to write it wins      when the next round is complete; it stays if
                                                                a rank was interrupted or gave up in it
news               a rank adds 1 for each item                  never: one key a store
news/{k}           the item: which rank failed, is gone, or     half a minute later, by its writer
                   is asked where it is
beat/{process}     the process's control thread, each second    when that thread ends
controls           how many control threads have begun, and     never: one key a store
                   how many of them have ended
=================  ===========================================  ==========================================
"""
