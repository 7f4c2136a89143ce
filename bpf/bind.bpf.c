/* cgroup/bind4, cgroup/bind6: the listening port is ours even while no
 * inspector runs. Attached at the cgroup root, because anyone who got the port
 * would receive the steered connections of others. */

static __always_inline int sidecar_bind(struct bpf_sock_addr *ctx)
{
    struct sidecar_config *cfg = sidecar_config();
    struct sidecar_owner *owner;
    struct sidecar_origin origin = {};
    u64 id;

    if (!cfg || bpf_ntohs((u16)ctx->user_port) != cfg->listen_port)
        return 1;
    if (ctx->type != SIDECAR_SOCK_STREAM || bpf_get_netns_cookie(ctx) != cfg->netns_cookie)
        return 1;
#pragma unroll
    for (int level = 1; level <= SIDECAR_CGROUP_LEVELS; level++) {
        id = bpf_get_current_ancestor_cgroup_id(level);
        if (!id)
            break;
        owner = owners.lookup(&id);
        if (owner && owner->role == SIDECAR_ROLE_INSPECTOR && owner->instance == cfg->instance)
            return 1;
    }
    sidecar_who(&origin);
    origin.original.port = cfg->listen_port;
    origin.original.family = (u16)ctx->user_family;
    sidecar_tell(SIDECAR_EVENT_BIND, 1, &origin);
    return 0;
}

int sidecar_bind4(struct bpf_sock_addr *ctx)
{
    return sidecar_bind(ctx);
}

int sidecar_bind6(struct bpf_sock_addr *ctx)
{
    return sidecar_bind(ctx);
}
