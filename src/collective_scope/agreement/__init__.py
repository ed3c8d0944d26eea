"""
How the ranks of a group agree on one verdict, over a store and nothing else of torch.

Read in this order, each module importing only from those before it:

* ``clock``: time, whatever tests do to it
* ``process``: which process a rank is, where it is, what the system says of it
* ``text``, ``stacks``, ``records``: what a rank tells, and what all ranks are told
* ``rounds``: paths of scopes, the count of a round, and `judge`, as pure functions
* ``wire``: how a verdict travels
* ``sockets``: whether this process serves a store; its connections, and to cut them
* ``store_thread``: store calls that can be bounded and left behind, and cut at the end
* ``life``: how a rank joins its group, and leaves it
* ``wait``, ``peers``: one wait; what a rank knows of its peers, and tells them
* ``part``: one rank's part in the rounds of its group: arrive, decide
* ``locate``: where the ranks are
* ``losses``: which of them are gone
* ``revocation``: free a rank that is stuck because a peer failed
* ``watch``: what has to be looked for while a scope lasts
* ``control``: the one thread of a process that looks, answers and warns
* ``barrier``: what the scope calls: arrive, and wait with a bound

A scope, which is around all this, uses it as follows. At its entry it has a `Span` looked after by the
control thread. A rank that fails calls ``publish`` at once; it arrives later, after its cleanups. At the
exit each rank calls ``arrive`` with a `Record` that says ``arrived``, and goes by the verdict. Where ranks
have collective cleanups left, they meet again after each: ``exit``, ``exit 2``, ... If a rank has failed and
not all have come within the group's grace, it is revoked, should it be a `Renewal`: each rank makes its own
communicators fail, so that those that are stuck in them come back, fail, and arrive. So are ranks freed that
do not come to an exit within the timeout. The next scope's entry makes the group again. A group that is
joined has a life, a random word; a rank's seat in it is its own key, which holds a random word first, and
then its record.

Nothing here imports from the package around it, and nothing here speaks to people: facts are
returned, or handed to a function that the scope gave.

Keys, below ``collective_scope/`` at the root of the store, except for ``life of {n}``, which is in the
group's own part of it:

=================  ===========================================  ==========================================
key                written by, and when                         when it goes
=================  ===========================================  ==========================================
life of {n}        the first rank that joins: a random word     with the last rank that leaves the group
                   that begins all keys of the group; a rank
                   that leaves counts itself behind it
{life}/rank/{r}    rank *r*: the latest `Record`                with the last rank that leaves the group
{life}/{round}/n   each rank adds 1 when it arrives, 2^21 more  soon after the next round that is complete
                   if it has something to tell; 2^42 if it is
                   the first, or among the first, to revoke
{life}/{round}/v   the verdict; the first to write it wins      with ``n``; it stays if a rank was interrupted
                                                                or gave up in the round
news               a rank adds 1 for each item; 2^42 counts     never: one key a store
                   the control threads that there are
news/{k}           the item: ``failed {life} {rank}``,          half a minute later, by its writer
                   ``lost {life} {rank}``, ``asked {life}
                   {round}``, ``revoked {life} {path}``, or
                   ``closing *``: the store's host leaves
beat/{process}     the process's control thread, each second    when that thread ends
=================  ===========================================  ==========================================
"""
