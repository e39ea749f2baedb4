(* Theorem 1 of the paper, over the real numbers: ranking keys by their coordinate along the query
   axis u = q/|q| is ranking them by <q, k>, ties included, and every top-k set is the same.

   Vectors are functions nat -> R of which the first [dim] entries count. Keys are numbered; a tie goes
   to the lower number. Checked by `coqc QueryAxis.v`. What it proves is pinned in statements.toml. *)

Require Import Reals Lra Lia Psatz List Sorted PeanoNat Compare_dec.
Import ListNotations.
Open Scope R_scope.

Section Vectors.

Variable dim : nat.
Definition vector := nat -> R.

Fixpoint dot_upto (n : nat) (a b : vector) : R :=
  match n with
  | O => 0
  | S m => dot_upto m a b + a m * b m
  end.

Definition dot (a b : vector) : R := dot_upto dim a b.
Definition norm (a : vector) : R := sqrt (dot a a).
Definition scale (c : R) (a : vector) : vector := fun d => c * a d.
Definition unit_query (q : vector) : vector := scale (/ norm q) q.
Definition nonzero (q : vector) : Prop := exists d, (d < dim)%nat /\ q d <> 0.

Lemma dot_upto_scale : forall n c a b, dot_upto n (scale c a) b = c * dot_upto n a b.
Proof.
  induction n; intros; simpl; unfold scale in *.
  - ring.
  - rewrite IHn. ring.
Qed.

Lemma dot_upto_self_nonneg : forall n a, 0 <= dot_upto n a a.
Proof. induction n; intros; simpl; [lra | specialize (IHn a); nra]. Qed.

Lemma dot_upto_self_pos : forall n a d, (d < n)%nat -> a d <> 0 -> 0 < dot_upto n a a.
Proof.
  induction n; intros a d Hd Ha; [lia | simpl].
  pose proof (dot_upto_self_nonneg n a) as Hn.
  destruct (Nat.eq_dec d n) as [-> | Hne].
  - assert (0 < a n * a n) by (destruct (Rdichotomy _ _ Ha); nra). lra.
  - assert (0 < dot_upto n a a) by (apply (IHn a d); [lia | assumption]). nra.
Qed.

Lemma norm_pos : forall q, nonzero q -> 0 < norm q.
Proof. intros q [d [Hd Hq]]. apply sqrt_lt_R0. exact (dot_upto_self_pos dim q d Hd Hq). Qed.

Lemma norm_unit_query : forall q, nonzero q -> dot (unit_query q) (unit_query q) = 1.
Proof.
  intros q Hq. pose proof (norm_pos q Hq) as Hn. unfold unit_query, dot.
  rewrite dot_upto_scale.
  assert (Hsym : forall n a b, dot_upto n a b = dot_upto n b a)
    by (induction n; intros; simpl; [reflexivity | rewrite IHn; ring]).
  rewrite Hsym, dot_upto_scale. fold (dot q q).
  assert (Hs : norm q * norm q = dot q q) by (apply sqrt_sqrt, dot_upto_self_nonneg).
  rewrite <- Hs. field. lra.
Qed.

Lemma dot_unit_query : forall q k, dot (unit_query q) k = / norm q * dot q k.
Proof. intros. apply dot_upto_scale. Qed.

End Vectors.

(* ---- Rankings of numbered scores ---------------------------------------------------------- *)

Definition scores := nat -> R.

(* i stands before j: a higher score, or the same score and a lower number. *)
Definition before (s : scores) (i j : nat) : Prop := s j < s i \/ (s i = s j /\ (i < j)%nat).

Lemma before_irreflexive : forall s i, ~ before s i i.
Proof. intros s i [H | [_ H]]; [lra | lia]. Qed.

Lemma before_transitive : forall s i j k, before s i j -> before s j k -> before s i k.
Proof. unfold before; intros s i j k [H | [H H']] [G | [G G']]; try (left; lra). right; split; [lra | lia]. Qed.

Lemma before_total : forall s i j, i <> j -> before s i j \/ before s j i.
Proof.
  unfold before; intros s i j Hij. destruct (Rtotal_order (s i) (s j)) as [H | [H | H]].
  - right; left; lra.
  - destruct (Nat.lt_gt_cases i j) as [T _]. destruct (T Hij); [left; right | right; right]; split; auto.
  - left; left; lra.
Qed.

Definition before_dec (s : scores) (i j : nat) : {before s i j} + {~ before s i j}.
Proof.
  unfold before. destruct (Rlt_dec (s j) (s i)); [left; now left |].
  destruct (Req_EM_T (s i) (s j)); [| right; intros [H | [H _]]; auto].
  destruct (lt_dec i j); [left; right; auto | right; intros [H | [_ H]]; auto].
Defined.

(* Position of key i among n keys: how many stand before it. It is in the top-k set if fewer than k do. *)
Definition rank (s : scores) (n i : nat) : nat :=
  length (filter (fun j => if before_dec s j i then true else false) (seq 0 n)).
Definition in_top (s : scores) (n k i : nat) : Prop := (i < n)%nat /\ (rank s n i < k)%nat.

(* Two score functions order n keys alike. *)
Definition same_order (s t : scores) (n : nat) : Prop :=
  forall i j, (i < n)%nat -> (j < n)%nat -> (before s i j <-> before t i j).

Lemma same_order_of_comparisons : forall s t n,
  (forall i j, (i < n)%nat -> (j < n)%nat -> (s i < s j <-> t i < t j)) -> same_order s t n.
Proof.
  intros s t n H i j Hi Hj. pose proof (H i j Hi Hj) as Hij. pose proof (H j i Hj Hi) as Hji.
  unfold before; split; intros [G | [G L]].
  - left; now apply Hji.
  - right; split; [| assumption]. destruct (Rtotal_order (t i) (t j)) as [T | [T | T]]; auto.
    + apply Hij in T; lra.
    + apply Hji in T; lra.
  - left; now apply Hji.
  - right; split; [| assumption]. destruct (Rtotal_order (s i) (s j)) as [T | [T | T]]; auto.
    + apply Hij in T; lra.
    + apply Hji in T; lra.
Qed.

Lemma same_order_rank : forall s t n i, same_order s t n -> (i < n)%nat -> rank s n i = rank t n i.
Proof.
  intros s t n i H Hi. unfold rank. f_equal. apply filter_ext_in. intros j Hj.
  apply in_seq in Hj. assert (Hjn : (j < n)%nat) by lia. specialize (H j i Hjn Hi).
  destruct (before_dec s j i), (before_dec t j i); tauto.
Qed.

Lemma same_order_top : forall s t n k, same_order s t n -> forall i, in_top s n k i <-> in_top t n k i.
Proof.
  intros s t n k H i. unfold in_top. split; intros [Hi Hr]; split; auto.
  - now rewrite <- (same_order_rank s t n i H Hi).
  - now rewrite (same_order_rank s t n i H Hi).
Qed.

Lemma same_order_sorted : forall s t n l, same_order s t n -> (forall i, In i l -> (i < n)%nat) ->
  StronglySorted (before s) l -> StronglySorted (before t) l.
Proof.
  intros s t n l H. induction l as [| a l IH]; intros Hl Hs; constructor; inversion_clear Hs.
  - apply IH; auto. intros i Hi; apply Hl; now right.
  - rewrite Forall_forall in *. intros b Hb. apply (H a b); [apply Hl; now left | apply Hl; now right | auto].
Qed.

(* Any strictly increasing map of the scores keeps the order: softmax, temperature, a cap, a sink. *)
Theorem increasing_keeps_order : forall (f : R -> R) s n,
  (forall x y, x < y -> f x < f y) -> same_order s (fun i => f (s i)) n.
Proof.
  intros f s n Hf. apply same_order_of_comparisons. intros i j _ _. split; [apply Hf |].
  intros H. destruct (Rtotal_order (s i) (s j)) as [T | [T | T]]; auto.
  - rewrite T in H; lra.
  - apply Hf in T; lra.
Qed.

(* ---- Theorem 1 ----------------------------------------------------------------------------- *)

Definition raw (dim : nat) (q : vector) (keys : nat -> vector) : scores := fun i => dot dim q (keys i).
Definition axis (dim : nat) (q : vector) (keys : nat -> vector) : scores :=
  fun i => dot dim (unit_query dim q) (keys i).

Theorem query_axis_comparison : forall dim q keys i j, nonzero dim q ->
  (axis dim q keys i <= axis dim q keys j <-> raw dim q keys i <= raw dim q keys j).
Proof.
  intros dim q keys i j Hq. unfold axis, raw. rewrite !dot_unit_query.
  pose proof (Rinv_0_lt_compat _ (norm_pos dim q Hq)) as Hn. split; intros; nra.
Qed.

Theorem query_axis_order : forall dim q keys n, nonzero dim q ->
  same_order (axis dim q keys) (raw dim q keys) n.
Proof.
  intros dim q keys n Hq. apply same_order_of_comparisons. intros i j _ _. unfold axis, raw.
  rewrite !dot_unit_query. pose proof (Rinv_0_lt_compat _ (norm_pos dim q Hq)). split; intros; nra.
Qed.

Corollary query_axis_top : forall dim q keys n k, nonzero dim q ->
  forall i, in_top (axis dim q keys) n k i <-> in_top (raw dim q keys) n k i.
Proof. intros. apply same_order_top. now apply query_axis_order. Qed.

Corollary query_axis_sorted : forall dim q keys n l, nonzero dim q -> (forall i, In i l -> (i < n)%nat) ->
  (StronglySorted (before (axis dim q keys)) l <-> StronglySorted (before (raw dim q keys)) l).
Proof.
  intros dim q keys n l Hq Hl.
  assert (H := query_axis_order dim q keys n Hq).
  split; apply (same_order_sorted _ _ n); auto. intros i j Hi Hj; symmetry; now apply H.
Qed.

Corollary scaled_query_order : forall dim c q keys n, 0 < c ->
  same_order (raw dim (scale c q) keys) (raw dim q keys) n.
Proof.
  intros dim c q keys n Hc. apply same_order_of_comparisons. intros i j _ _. unfold raw, dot.
  rewrite !dot_upto_scale. split; intros; nra.
Qed.

(* With a sink in the denominator the weight exp(s)/(exp(z) + total) still increases with s. *)
Corollary sink_keeps_order : forall s z total n, 0 <= total ->
  same_order s (fun i => exp (s i) / (exp z + total)) n.
Proof.
  intros s z total n Ht. apply (increasing_keeps_order (fun x => exp x / (exp z + total))).
  intros x y Hxy. apply Rmult_lt_compat_r.
  - apply Rinv_0_lt_compat. pose proof (exp_pos z). lra.
  - now apply exp_increasing.
Qed.

(* ---- Where it stops: two keys suffice each time -------------------------------------------- *)

Definition two (a b : R) : scores := fun i => match i with O => a | _ => b end.

Theorem bias_breaks_order : exists (s bias : scores), ~ same_order s (fun i => s i + bias i) 2.
Proof.
  exists (two 1 0), (two 0 2). intros H. destruct (H 0%nat 1%nat) as [G _]; auto.
  assert (B : before (two 1 0) 0 1) by (left; simpl; lra).
  apply G in B. destruct B as [B | [B _]]; simpl in B; lra.
Qed.

Theorem key_scale_breaks_order : exists (s c : scores),
  (forall i, 0 < c i) /\ ~ same_order s (fun i => c i * s i) 2.
Proof.
  exists (two 2 1), (two 1 3). split; [intros [| i]; simpl; lra |].
  intros H. destruct (H 0%nat 1%nat) as [G _]; auto.
  assert (B : before (two 2 1) 0 1) by (left; simpl; lra).
  apply G in B. destruct B as [B | [B _]]; simpl in B; lra.
Qed.

Theorem negative_scale_breaks_order : exists s : scores, ~ same_order s (fun i => - s i) 2.
Proof.
  exists (two 1 0). intros H. destruct (H 0%nat 1%nat) as [G _]; auto.
  assert (B : before (two 1 0) 0 1) by (left; simpl; lra).
  apply G in B. destruct B as [B | [B _]]; simpl in B; lra.
Qed.

(* ---- Theorem 3: order in floating point ----------------------------------------------------- *)

(* Computed scores within their error bounds keep every pair whose exact gap exceeds the two bounds,
   whatever common positive factor c the computed normalisation carried. *)
Theorem gap_above_bound_keeps_order : forall x s t e : scores, forall c i j, 0 < c ->
  Rabs (s i - x i) <= e i -> Rabs (s j - x j) <= e j ->
  Rabs (t i / c - x i) <= e i -> Rabs (t j / c - x j) <= e j ->
  e i + e j < x i - x j -> s j < s i /\ t j < t i.
Proof.
  intros x s t e c i j Hc Hsi Hsj Hti Htj Hgap.
  assert (A : forall y, y <= Rabs y) by apply Rle_abs.
  assert (B : forall y, - y <= Rabs y) by (intros y; rewrite <- Rabs_Ropp; apply Rle_abs).
  pose proof (A (s j - x j)); pose proof (B (s i - x i)).
  pose proof (A (t j / c - x j)); pose proof (B (t i / c - x i)).
  split; [lra |].
  assert (D : t j / c < t i / c) by lra.
  apply (Rmult_lt_compat_r c) in D; [| assumption]. unfold Rdiv in D.
  rewrite !Rmult_assoc, !Rinv_l, !Rmult_1_r in D by lra. assumption.
Qed.

Print Assumptions query_axis_top.
