/* cgroup_skb/egress: the guard. A packet of a steered socket leaves only
 * towards our listener, whatever became of the mark, the table or the order of
 * foreign rules; and the first one says, after NAT, whose connection the
 * listener is about to see. In a container's namespace there is no guard, only
 * that note. Also refuses QUIC on connected UDP sockets, where
 * connect() must not be refused (getaddrinfo connects to sort). Returns 1 to
 * pass, 0 to drop. */

static __always_inline int sidecar_is_listener(struct sidecar_flow_key *key, u32 port)
{
    u32 head, tail;

    if (key->destination_port != port)
        return 0;
    if (key->destination[10] == 0xff && key->destination[11] == 0xff && !key->destination[0])
        return key->destination[12] == 127;
    __builtin_memcpy(&head, key->destination, 4);
    __builtin_memcpy(&tail, key->destination + 12, 4);
    return head == 0 && key->destination[4] == 0 && key->destination[8] == 0 && tail == bpf_htonl(1);
}

/* As sidecar_not_ours, by the socket: a packet may leave from a softirq, where
 * the current task is anybody. */
static __always_inline int sidecar_socket_not_ours(struct __sk_buff *skb, u64 instance)
{
    struct sidecar_owner *owner;
    u64 id;

#pragma unroll
    for (int level = 1; level <= SIDECAR_CGROUP_LEVELS; level++) {
        id = bpf_skb_ancestor_cgroup_id(skb, level);
        if (!id)
            return 0;
        owner = owners.lookup(&id);
        if (!owner)
            continue;
        if (owner->role == SIDECAR_ROLE_INSPECTOR || owner->instance != instance)
            return 1;
    }
    return 0;
}

int sidecar_egress(struct __sk_buff *skb)
{
    struct sidecar_config *cfg = sidecar_config();
    struct sidecar_flow_key key = {};
    struct sidecar_origin *origin = 0;
    struct bpf_sock *sk;
    u32 offset, v4, port;
    u8 first, proto, flags;
    u16 pair[2];

    if (!cfg || !skb->sk)
        return 1;
    sk = bpf_sk_fullsock(skb->sk);
    if (!sk)
        return 1; /* TIME_WAIT and request sockets: they carry no data */
    origin = steered.sk_storage_get(sk, 0, 0);
    if (!origin && sk->protocol != SIDECAR_IPPROTO_UDP)
        return 1;

    if (bpf_skb_load_bytes(skb, 0, &first, 1))
        return origin ? 0 : 1;
    if ((first >> 4) == 4) {
        offset = (first & 0x0f) * 4;
        if (bpf_skb_load_bytes(skb, 9, &proto, 1))
            return origin ? 0 : 1;
        bpf_skb_load_bytes(skb, 12, &v4, 4);
        sidecar_set4(key.source, v4);
        bpf_skb_load_bytes(skb, 16, &v4, 4);
        sidecar_set4(key.destination, v4);
    } else {
        /* Our own stack puts no extension header before TCP of a steered socket;
         * with one, the guard drops below. */
        offset = 40;
        if (bpf_skb_load_bytes(skb, 6, &proto, 1))
            return origin ? 0 : 1;
        bpf_skb_load_bytes(skb, 8, key.source, 16);
        bpf_skb_load_bytes(skb, 24, key.destination, 16);
    }
    if (bpf_skb_load_bytes(skb, offset, pair, 4))
        return origin ? 0 : 1;
    key.source_port = bpf_ntohs(pair[0]);
    key.destination_port = bpf_ntohs(pair[1]);

    if (!origin) {
        struct sidecar_origin quic = {};

        port = SIDECAR_QUIC_PORT;
        if (proto != SIDECAR_IPPROTO_UDP || key.destination_port != SIDECAR_QUIC_PORT ||
            !(cfg->flags & SIDECAR_REFUSE_QUIC) || !ports.lookup(&port))
            return 1;
        __builtin_memcpy(quic.original.bytes, key.destination, 16);
        quic.original.port = key.destination_port;
        quic.original.family = (first >> 4) == 4 ? SIDECAR_AF_INET : SIDECAR_AF_INET6;
        if (sidecar_excluded(&quic.original) || sidecar_socket_not_ours(skb, cfg->instance))
            return 1;
        quic.ktime_ns = bpf_ktime_get_ns();
        quic.cookie = bpf_get_socket_cookie(skb);
        quic.cgroup_id = bpf_skb_cgroup_id(skb);
        sidecar_tell(SIDECAR_EVENT_QUIC, 1, &quic);
        return 0;
    }

    if (origin->netns_cookie == cfg->netns_cookie &&
        (proto != SIDECAR_IPPROTO_TCP || !sidecar_is_listener(&key, cfg->listen_port))) {
        sidecar_tell(SIDECAR_EVENT_GUARD, 1, origin);
        return 0;
    }
    if (proto != SIDECAR_IPPROTO_TCP)
        return 1;
    if (bpf_skb_load_bytes(skb, offset + 13, &flags, 1))
        return 0;
    if ((flags & 0x12) == 0x02) { /* SYN without ACK */
        if (flows.update(&key, origin)) {
            sidecar_tell(SIDECAR_EVENT_MAP_FULL, 1, origin);
            return 0;
        }
    }
    return 1;
}
